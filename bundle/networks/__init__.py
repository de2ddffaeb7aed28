"""Shifted-Window Mamba networks: selective scan, encoder, masked autoencoder."""
