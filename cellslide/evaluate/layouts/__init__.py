"""Data sets read as their authors distribute them, a file each."""
