"""What commands over many slides share: where each goes, who hears of it, what is told of it, how it all ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli.options import FOLDER

if TYPE_CHECKING:
    from cellslide.batch import Ledger
    from cellslide.batch.local_copy import LocalCopies
    from cellslide.batch.run import SlideOutcome
    from cellslide.batch.workers import Work
    from cellslide.classify.targets import Target
    from cellslide.cli.progress import RunProgress
    from cellslide.progress import StopCheck, Watch
    from cellslide.slides.inputs import SlideInput

log = logging.getLogger(__name__)

stage_option = click.option(
    "--stage-dir", type=FOLDER, metavar="DIR",
    help="Copy each slide to this local folder first, as far as it fits, and remove it after.",
)  # fmt: skip

Pairs = Iterable[tuple["Target", "SlideOutcome"]]


@dataclass(frozen=True, slots=True)
class RunOutput:
    """What is told of a run: a JSON line per slide, a bar or lines, and the summary in the output folder."""

    log_json: bool
    shown: bool
    ledger: Ledger


def telling(log_json: bool, no_progress: bool, ledger: Ledger) -> RunOutput:
    """Return what the flags ask to be told; -q silences all but errors."""
    shown = not no_progress and logging.getLogger("cellslide").isEnabledFor(logging.INFO)
    return RunOutput(log_json, shown, ledger)


def copies_in(stage_dir: Path | None) -> LocalCopies | None:
    """Return where `--stage-dir` copies slides to, if it is given."""
    from cellslide.batch.local_copy import LocalCopies

    return None if stage_dir is None else LocalCopies(stage_dir)


def to_targets(sources: Sequence[SlideInput], output: Path) -> list[Target]:
    """Return slides with the folders of their results."""
    from cellslide.classify.targets import Target

    return [Target(source, output / source.slide_id) for source in sources]


def ledger_for(targets: Sequence[Target], output: Path, named: Sequence[str] = ()) -> Ledger:
    """Return what keeps how the slides end, in the output folder and in folders of results that were named."""
    from cellslide.batch import Ledger, summary_folders

    return Ledger(summary_folders(targets, output, map(Path, named)))


@contextmanager
def watched(slides: int, shown: bool, stages: int = 1) -> Iterator[tuple[RunProgress, StopCheck]]:
    """Yield the progress of a run over so many slides, and what says whether to stop."""
    from cellslide.batch.run import StopOnSignal
    from cellslide.cli.progress import progress_bar

    with StopOnSignal() as stop, progress_bar(slides, shown, stages) as progress:
        yield progress, stop


def one_by_one(
    targets: Sequence[Target],
    work: Callable[[Iterator[Target], Watch], Iterator[SlideOutcome]],
    tell: RunOutput,
    copies: LocalCopies | None,
    is_done: Callable[[Target], bool],
    stages: int = 1,
) -> list[SlideOutcome]:
    """Do slides one after another in this process; each is copied first if `copies` says where, unless it is done."""
    from cellslide.batch.local_copy import local_targets
    from cellslide.progress import Watch

    with watched(len(targets), tell.shown, stages) as (progress, stop):
        watch = Watch(progress, stop)
        with local_targets(targets, copies, watch, is_done) as stream:
            return told(zip(targets, work(stream, watch), strict=False), tell, progress)


def on_devices(
    work: Work, targets: Sequence[Target], devices: Sequence[str], tell: RunOutput, stages: int = 1
) -> list[SlideOutcome]:
    """Do slides on several devices, a process each."""
    from cellslide.batch.workers import over_devices

    with watched(len(targets), tell.shown, stages) as (progress, stop):
        return told(over_devices(work, targets, devices, progress.lane, stop), tell, progress)


def told(pairs: Pairs, tell: RunOutput, progress: RunProgress) -> list[SlideOutcome]:
    """Tell of slides as they end; the summary is written at the end, also of a run that was stopped."""
    outcomes = []
    try:
        for target, outcome in pairs:
            outcomes.append(outcome)
            tell.ledger.keep(target, outcome)
            progress.ended(outcome)
            if tell.log_json:
                click.echo(json.dumps({**outcome.to_json(), "seconds": round(outcome.seconds, 2)}))
            elif outcome.cells == 0 and outcome.status == "done":
                log.warning("%s: no nuclei; see tissue.geojson for what was searched", outcome.slide)
    finally:
        tell.ledger.write()
    return outcomes


def finish(outcomes: list[SlideOutcome], tell: RunOutput) -> int:
    """Show the summary and the errors; return the exit code."""
    from cellslide.batch import PAGE_FILE
    from cellslide.batch.run import exit_code
    from cellslide.cli.progress import summary

    if logging.getLogger("cellslide").isEnabledFor(logging.INFO):
        summary(outcomes, to_stderr=tell.log_json)
        for folder in tell.ledger.folders if len(outcomes) > 1 else ():
            click.echo(f"all slides at a glance: {folder / PAGE_FILE}", err=tell.log_json)
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"cellslide: {' '.join(outcome.slide.splitlines())}: {outcome.error}", err=True)
    return exit_code(outcomes)
