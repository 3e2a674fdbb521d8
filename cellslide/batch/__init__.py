"""Many slides: what is done with each (`work`), where (`executor`), how they ended (`run`, `summary`).

Nothing is imported here: the process of a device should start fast.
"""
