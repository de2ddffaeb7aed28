"""Speed and memory: `python -m benchmarks` prints the tables of docs/performance.md."""
