"""Noise schedules, prediction types, losses, samplers, image generation and validation."""
