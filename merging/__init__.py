"""What the commands of merge.py do: opening files of any kind, sums of adapters, sums of models, comparisons, and cloneofsimo's lora_add."""
