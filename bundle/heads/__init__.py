"""Readouts of an encoder: light heads that turn its tokens into one logit."""
