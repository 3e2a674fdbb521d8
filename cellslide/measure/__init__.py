"""Numbers of a study from finished slides: counts, shares, shapes, neighbours and distances, by region.

regions.py holds where is measured, nuclei.py what is read of a table, counts.py and neighbours.py measure, slide.py
joins them, tables.py and page.py write.
"""
