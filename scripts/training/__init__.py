"""A training run: its handlers, checkpoints and records. Imports running, scans and diffusion."""
