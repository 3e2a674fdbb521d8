"""Training of CellDETR, which finds nuclei as boxes."""
