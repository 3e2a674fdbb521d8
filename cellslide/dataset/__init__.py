"""Corrected nuclei of slides as a data set to train on, and places that are worth a correction."""
