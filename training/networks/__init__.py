"""Frozen networks of a run: quantized, streamed, off the device, divided among processes."""
