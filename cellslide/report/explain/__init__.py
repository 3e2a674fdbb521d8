"""Why nuclei were typed as they were: cells chosen from a finished table, and where both paths looked, as one page.

select.py chooses and reads cells, gradcam.py makes maps on any backbone, paths.py runs both paths, gallery.py writes
the page, slide.py is the flow.
"""

from cellslide.report.explain.select import Selection, select_cells
from cellslide.report.explain.slide import explain_slide

__all__ = ["Selection", "explain_slide", "select_cells"]
