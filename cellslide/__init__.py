"""cellslide: a slide in, a table of its nuclei out."""

__version__ = "0.1.0"
