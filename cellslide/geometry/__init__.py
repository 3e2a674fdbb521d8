"""Outlines and label maps as numpy columns, with their compiled loops."""
