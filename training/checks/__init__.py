"""Checks of a config before training: its values, its groups, its optimizer, its data and model."""
