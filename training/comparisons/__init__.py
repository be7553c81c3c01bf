"""Comparisons of finished runs: `train.py --compare` and its measures."""
