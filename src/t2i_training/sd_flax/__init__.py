"""Stable Diffusion in JAX, for the Flax script alone: devices, networks, weight updates, pipeline folders."""
