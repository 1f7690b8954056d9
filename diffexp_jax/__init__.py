"""Reward fine-tuning of text-to-image diffusion models in JAX, with the exploration method of DiffExp."""
