"""Speed and memory: `python -m scripts.benchmarks` prints the tables of docs/performance.md."""
