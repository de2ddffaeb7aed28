"""From the store to batches: subject splits, clips, and what the network receives."""
