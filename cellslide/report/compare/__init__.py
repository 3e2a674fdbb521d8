"""Two results of the same slides compared: which nuclei both found, what class both gave, and where they differ."""

from cellslide.report.compare.folders import Pair, pair_folders
from cellslide.report.compare.page import render_comparison
from cellslide.report.compare.slide import Comparison, Pictures, compare_slide, take_pictures

__all__ = ["Comparison", "Pair", "Pictures", "compare_slide", "pair_folders", "render_comparison", "take_pictures"]
