"""A training run: its handlers, checkpoints and records. Imports running, data and diffusion."""
