"""Inputs of the training steps: images, class images, masks, captions, latents, noise."""
