"""What the page says beside the verdict: where the pixel size is from, what is not there, terms of the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cellslide.types import RunRecord

MPP_WORDS = {
    "vendor": "as the scanner wrote it into the file",
    "ome": "as the OME metadata state it",
    "flag": "as given by --mpp",
    "list": "as given in the list of slides",
    "tiff": "from the resolution of the TIFF, which some programs set at will",
}


def notes(record: RunRecord, mpp_source: str, slide_gone: str | None) -> Iterator[str]:
    """Yield what is to be known beside the verdict, a sentence each."""
    yield f"The pixel size is {MPP_WORDS.get(mpp_source, mpp_source)}."
    if slide_gone is not None:
        yield f"{slide_gone}. There are no pictures."
    if (record.config.get("classify") or {}).get("organ") == "unknown":
        yield "The classifier was not told the organ (--organ)."
    for weights in record.weights:
        if re.search(r"\bNC\b|non-?commercial", weights.licence or "", re.IGNORECASE):
            yield f"{weights.id}: {weights.licence}; no commercial use."
        elif not weights.licence:
            yield f"{weights.id}: no licence is stated."
