"""The commands of merge.py, one file each, and the algebra of adapters in factor space."""
