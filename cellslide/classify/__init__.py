"""Typing of nuclei: a network of two paths on crops around each cell, and the rule that decides from both.

engine.py runs the network on regions, cells.py goes over the cells of a slide, store.py keeps what is done, slide.py
writes the table, effects.py measures what each saving costs and changes.
"""

from cellslide.classify.cells import Work, classify_array, classify_cells, prepare
from cellslide.classify.engine import Classifier, open_classifier
from cellslide.classify.slide import SlideClassifier, classify_table, regate_slide

__all__ = [
    "Classifier",
    "SlideClassifier",
    "Work",
    "classify_array",
    "classify_cells",
    "classify_table",
    "open_classifier",
    "prepare",
    "regate_slide",
]
