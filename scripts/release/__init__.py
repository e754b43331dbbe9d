"""The bundle and its networks as other programs receive them. Imports running and diffusion."""
