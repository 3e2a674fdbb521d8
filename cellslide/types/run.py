"""The record of a run: what it met, how long it took, whether it can be used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


@dataclass(slots=True)
class Counts:
    """What a run met: tiles searched, empty ones, failed ones, nuclei before and after the merge.

    rejected counts what a classifier takes for no nucleus, which `nuclei` leaves out; abstained, nuclei of no class.
    tiles_missing counts tiles of the file, not of the search: those inside the tissue that the file leaves out.
    """

    tiles: int = 0
    tiles_empty: int = 0
    tiles_failed: int = 0
    tiles_missing: int = 0
    nuclei_raw: int = 0
    nuclei: int = 0
    rejected: int = 0
    abstained: int = 0


@dataclass(slots=True)
class Seconds:
    """Wall seconds by stage; stages overlap, so `total` is less than their sum."""

    read: float = 0.0
    infer: float = 0.0
    decode: float = 0.0
    merge: float = 0.0
    classify: float = 0.0
    write: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class BatchSize:
    """Items in one pass of a network, as really used: tiles, local crops, contexts; None where there were none."""

    tiles: int | None = None
    local: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The weights a run used."""

    id: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class FailedTile:
    """A tile that could not be done: level-0 corner of its read box, and why."""

    x: int
    y: int
    error: str


Word = Literal["good", "look", "do not use"]
# From the best to the worst.
WORDS: tuple[Word, ...] = get_args(Word)


@dataclass(frozen=True, slots=True)
class Check:
    """A measure of a run beside what is expected of it: `word` grades it, `advice` says why and what to do next.

    name  what was measured, with its unit, as in `nucleus_diameter_um`.
    """

    name: str
    value: float | str
    expected: str
    word: Word
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run can be used: the worst word of its checks."""

    word: Word
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Verdict:
        """Return the verdict of checks, the worst first."""
        ranked = tuple(sorted(checks, key=lambda check: -WORDS.index(check.word)))
        return cls(ranked[0].word if ranked else "good", ranked)

    @property
    def reasons(self) -> tuple[Check, ...]:
        """The checks that are not good."""
        return tuple(check for check in self.checks if check.word != "good")


@dataclass(slots=True)
class RunRecord:
    """What `run.json` holds; `status` is "running" until the slide is complete, then "done" or "done_with_errors"."""

    cellslide_version: str
    status: Literal["running", "interrupted", "done", "done_with_errors", "failed"]
    slide: dict[str, Any]
    config: dict[str, Any]
    weights: list[WeightsRef]
    device: str
    engine: str
    precision: str
    seed: int
    started: str
    finished: str | None = None
    counts: Counts = field(default_factory=Counts)
    searched_mm2: float | None = None
    verdict: Verdict | None = None
    batch_size: BatchSize = field(default_factory=BatchSize)
    failed_tiles: list[FailedTile] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    error: str | None = None
