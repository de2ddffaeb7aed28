"""What a network is worth: subjects' scores, intervals, reconstruction, attribution, maps."""
