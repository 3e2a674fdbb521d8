"""Print the means of scores over runs: `python mean.py split1.json split2.json split3.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any


def numbers(scores: Any, name: str = "") -> dict[str, float]:
    """Return the numbers of a report by their dotted names."""
    if isinstance(scores, dict):
        return {k: v for key, inner in scores.items() for k, v in numbers(inner, f"{name}.{key}".strip(".")).items()}
    return {name: float(scores)} if isinstance(scores, int | float) else {}


def main(files: list[str]) -> None:
    """Print each score that all files have, its mean and its least and largest value."""
    runs = [numbers(json.loads(Path(file).read_text(encoding="utf-8"))) for file in files]
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        if len(values) == len(runs):
            print(f"{name:40} {mean(values):.4f}  ({min(values):.4f} to {max(values):.4f})")


if __name__ == "__main__":
    main(sys.argv[1:])
