"""What is hidden from the network: draws, dictionary transforms, and the curriculum."""
