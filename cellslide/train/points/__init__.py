"""Training of point detectors."""
