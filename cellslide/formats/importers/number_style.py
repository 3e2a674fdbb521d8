"""How a table writes its numbers: 1234.5, 1234,5, 1.234,5, 1,234.5 or 1 234.5; the whole file decides, not a value.

"1,234" alone may be either of two numbers a thousand apart. Where nothing else in a file tells, it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellslide.errors import UsageError, short
from cellslide.types import Float64

Style = Literal["plain", "decimal comma", "comma groups", "point groups"]
# Spaces and apostrophes between digits part thousands wherever they stand.
_GROUPED = r"(\d)[ \t\x{00A0}\x{2009}\x{202F}'\x{2019}](\d{3})"
_SIGN, _POWER = r"^[+-]?", r"([eE][+-]?\d+)?$"
_SIGNS: dict[str, str] = {
    "decimal comma": rf"{_SIGN}(\d*,(\d{{1,2}}|\d{{4,}})|(0|\d{{4,}}),\d{{3}}|\d{{1,3}}(\.\d{{3}})+,\d*){_POWER}",
    "comma groups": rf"{_SIGN}(\d{{1,3}}(,\d{{3}})+\.\d*|\d{{1,3}}(,\d{{3}}){{2,}})$",
    "point groups": rf"{_SIGN}\d{{1,3}}(\.\d{{3}}){{2,}}(,\d*)?$",
    "decimal point": rf"{_SIGN}(\d*\.(\d{{1,2}}|\d{{4,}})|(0|\d{{4,}})\.\d{{3}}){_POWER}",
    "either comma": rf"{_SIGN}[1-9]\d{{0,2}},\d{{3}}$",
    "either point": rf"{_SIGN}[1-9]\d{{0,2}}\.\d{{3}}$",
    "ungrouped": rf"{_SIGN}\d{{4,}}$",
    "small": rf"{_SIGN}\d{{1,3}}$",
}


def is_text(values: Any) -> bool:
    """Tell whether a column (arrow) holds texts."""
    return bool(pa.types.is_string(values.type) or pa.types.is_large_string(values.type))


@dataclass(slots=True)
class NumberSurvey:
    """What was seen of the texts that are to be numbers; `example` is one for each way to write them."""

    example: dict[str, str] = field(default_factory=dict)

    def see(self, values: Any) -> None:
        """Look at a column of texts."""
        texts = _cleaned(values)
        for name, pattern in _SIGNS.items():
            if (
                name not in self.example
                and (found := pc.index(pc.match_substring_regex(texts, pattern), True).as_py()) >= 0
            ):
                self.example[name] = str(values[found].as_py())[:40]

    def style(self, where: str, separator: str) -> Style:
        """Return how numbers are written; raises UsageError, naming `where` and examples, where that is not known."""
        seen = self.example
        commas = "decimal comma" in seen or (
            "either comma" in seen and "comma groups" not in seen and ("ungrouped" in seen or separator == ";")
        )
        if commas:
            self._refuse(
                where, "decimal comma" if "decimal comma" in seen else "either comma", "comma groups", "decimal point"
            )
            return "decimal comma"
        if "comma groups" in seen or ("either comma" in seen and "decimal point" in seen):
            self._refuse(
                where, "comma groups" if "comma groups" in seen else "either comma", "point groups", "ungrouped"
            )
            return "comma groups"
        if "point groups" in seen:
            self._refuse(where, "point groups", "decimal point", "ungrouped")
            return "point groups"
        if "either comma" in seen:
            raise UsageError(f"{where}: {short(seen['either comma'])} may be two numbers; write decimals with a point")
        if (
            separator == ";"
            and {"either point", "small"} <= seen.keys()
            and not {"decimal point", "ungrouped"} & seen.keys()
        ):
            raise UsageError(
                f"{where}: {short(seen['either point'])} may be two numbers; write thousands without a point"
            )
        return "plain"

    def _refuse(self, where: str, one: str, *others: str) -> None:
        """Raise UsageError where numbers are written in two ways that exclude each other."""
        other = next((name for name in others if name in self.example), None)
        if other is not None:
            pair = f"{short(self.example[one])} and {short(self.example[other])}"
            raise UsageError(f"{where}: writes numbers in two ways, {pair}; write decimals with a point")


def to_numbers(values: Any, style: Style) -> Float64:
    """Return texts of a style as numbers, NaN for what is none."""
    import pandas as pd

    texts = _cleaned(values)
    if style in ("decimal comma", "point groups"):
        texts = pc.replace_substring(pc.replace_substring(texts, ".", ""), ",", ".")
    elif style == "comma groups":
        texts = pc.replace_substring(texts, ",", "")
    return np.asarray(pd.to_numeric(pd.Series(texts.to_pylist()), errors="coerce"), np.float64)


def _cleaned(values: Any) -> Any:
    texts = pc.utf8_trim_whitespace(values)
    if not pc.any(pc.match_substring_regex(texts, _GROUPED)).as_py():
        return texts
    for _ in range(2):  # the groups of "1 234 567" share a digit
        texts = pc.replace_substring_regex(texts, _GROUPED, r"\1\2")
    return texts
