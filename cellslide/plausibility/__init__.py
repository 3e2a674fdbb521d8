"""Whether a run can be used: its nuclei and its pixels against what tissue looks like, and one verdict."""
