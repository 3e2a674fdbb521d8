"""Slides: the list of inputs, opening and reading, pixel size, tissue, and the tiles that are searched."""
