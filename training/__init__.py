"""Training runs: opening data, model and optimizer, step inputs, logs, checkpoints and results."""
