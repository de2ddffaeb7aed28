"""Command-line tools: `python -m scripts COMMAND`; each makes one call into `bundle`."""
