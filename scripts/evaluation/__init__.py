"""Cohorts of volumes, measures on them, the report and the reader study. Imports running, scans and diffusion."""
