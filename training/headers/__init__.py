"""Header entries of a run's files, as programs that manage LoRA files read them."""
