"""The run folder: its files, lock, reports, images and model card."""
