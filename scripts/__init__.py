"""Helpers that the configs of this bundle name; each module has one subject."""
