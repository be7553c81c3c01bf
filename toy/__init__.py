"""The embedded toy model: drawings, pretraining, recogniser and evaluation."""
