"""The embedded toy model: drawings, pretraining, recogniser and evaluation of a small latent
diffusion model.
"""
