"""Texts of strangers in CSV: a spreadsheet takes what begins with = + - or @ for a formula and runs it.

Such a text gets a leading quote, as spreadsheets write it themselves; read again, the quote is dropped. A text that
begins with quotes and then such a sign gets one more, so that every text comes back as it was.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow.compute as pc

_FORMULA = r"\A'*[=+\-@\t\r\n\x00]"
_IS_FORMULA = re.compile(_FORMULA)


def harmless(text: str) -> str:
    """Return a text that no spreadsheet runs."""
    return f"'{text}" if _IS_FORMULA.match(text) else text


def harmless_column(texts: Any) -> Any:
    """Return a column of texts (arrow) that no spreadsheet runs; without such a text it is the same column."""
    found = pc.match_substring_regex(texts, _FORMULA)
    if not pc.any(found).as_py():
        return texts
    return pc.if_else(found, pc.binary_join_element_wise("'", texts, ""), texts)


def as_written(text: str) -> str:
    """Return a text as it was before `harmless`."""
    return text[1:] if text[:1] == "'" and _IS_FORMULA.match(text) else text
