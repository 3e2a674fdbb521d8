"""One page per slide that tells whether to trust its run: `report.html`, self-contained, without scripts."""

from cellslide.report.slide import PAGE_FILE, keep_report, needs_report, write_report

__all__ = ["PAGE_FILE", "keep_report", "needs_report", "write_report"]
