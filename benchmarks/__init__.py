"""What is timed against which peer, in one run; benchmarks/README.md has the figures."""
