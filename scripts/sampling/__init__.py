"""A sampling run and the files that it writes. Imports running, scans and diffusion."""
