"""SAMPLES.csv: slides with their Xenium bundles, by patient."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellslide.errors import UsageError
from cellslide.store.foreign_files import read_text

REQUIRED = ("slide", "bundle")
COLUMNS = (*REQUIRED, "alignment", "patient", "split", "mpp", "organ")


@dataclass(frozen=True, slots=True)
class FusionSample:
    """A slide and what was measured on it; a slide without a patient is a patient of its own.

    alignment  file of the alignment, None: the one beside the slide; mpp  µm per pixel over what the slide's file says.
    bundle     None only where no transcripts are read.
    """

    slide: Path
    bundle: Path | None
    alignment: Path | None = None
    patient: str = ""
    split: str = ""
    mpp: float | None = None
    organ: str = ""

    @property
    def name(self) -> str:
        """Name of the slide's file."""
        return self.slide.name


def read_samples(path: Path) -> tuple[FusionSample, ...]:
    """Read a table with the columns slide and bundle, and alignment, patient, split, mpp, organ where they are known.

    Paths are relative to the table. Raises UsageError for a column or a number that is none, for a file that is not
    there, and for a patient in two splits.
    """
    rows = csv.DictReader(read_text(path, UsageError).splitlines())
    header = [(name or "").strip() for name in rows.fieldnames or ()]
    missing, unknown = set(REQUIRED) - set(header), set(header) - set(COLUMNS)
    if missing or unknown:
        what = f"no column {', '.join(sorted(missing))}" if missing else f"unknown column {', '.join(sorted(unknown))}"
        raise UsageError(f"{path}: {what}; it has {', '.join(REQUIRED)} and may have {', '.join(COLUMNS[2:])}")
    found = [
        _sample(path, rows.line_num, {(k or "").strip(): (v or "").strip() for k, v in row.items()}) for row in rows
    ]
    if not found:
        raise UsageError(f"{path}: no samples")
    _check_patients(path, found)
    return tuple(found)


def _sample(path: Path, line: int, row: dict[str, str]) -> FusionSample:
    places = {name: path.parent / row[name] if row.get(name) else None for name in ("slide", "bundle", "alignment")}
    for name, place in places.items():
        if place is None and name in REQUIRED:
            raise UsageError(f"{path}: line {line}: {name} is empty")
        if place is not None and not place.exists():
            raise UsageError(f"{path}: line {line}: no such {name}: {place}")
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else None
    except ValueError:
        raise UsageError(f"{path}: line {line}: mpp {row['mpp']!r} is no number of µm") from None
    slide = places["slide"]
    assert slide is not None
    return FusionSample(
        slide, places["bundle"], places["alignment"], row.get("patient") or slide.name, row.get("split", ""), mpp,
        row.get("organ", ""),
    )  # fmt: skip


def _check_patients(path: Path, samples: Iterable[FusionSample]) -> None:
    seen: dict[str, str] = {}
    for sample in samples:
        if seen.setdefault(sample.patient, sample.split) != sample.split:
            raise UsageError(
                f"{path}: patient {sample.patient} is in two splits, {seen[sample.patient]} and {sample.split}"
            )


def fold_of(samples: Sequence[FusionSample], index: int, count: int, seed: int = 0) -> tuple[FusionSample, ...]:
    """Return the samples with the splits of fold `index` (from 1) of `count`: a part of the patients tests, of the rest
    the next part validates.

    Raises UsageError for fewer patients than parts.
    """
    patients = sorted({sample.patient for sample in samples})
    if count < 3 or len(patients) < count or not 1 <= index <= count:
        raise UsageError(
            f"--fold {index}/{count}: needs 3 parts or more, and a patient for each; here are {len(patients)}"
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    part = {patients[k]: place % count for place, k in enumerate(order)}
    names = {index - 1: "test", index % count: "val"}
    return tuple(replace(sample, split=names.get(part[sample.patient], "train")) for sample in samples)
