"""Out of the lab: published weights in, released models, inference, NIfTI, and other people's suites."""
