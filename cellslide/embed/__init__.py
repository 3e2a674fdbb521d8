"""Features of nuclei by a MUSE backbone: a vector for each place, read from the map of the window around it.

engine.py runs the network over windows, store.py keeps what is done, slide.py writes the table.
"""

from cellslide.embed.engine import Embedder, embed_array, embed_cells, embed_places, open_embedder
from cellslide.embed.slide import embed_slide, embed_target

__all__ = ["Embedder", "embed_array", "embed_cells", "embed_places", "embed_slide", "embed_target", "open_embedder"]
