"""Files on disk: atomic replacement, locks, checkpoints, the run record, and the table of cells."""
