"""What commands over many slides share: options, how a run is shown and noted, and how it all ended."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from cellslide.cli.options import FOLDER, chain

if TYPE_CHECKING:
    from cellslide.batch.executor import Ended, SlideExecutor
    from cellslide.batch.local_copy import LocalCopies
    from cellslide.batch.run import SlideOutcome
    from cellslide.batch.summary import Ledger
    from cellslide.batch.workers import Work
    from cellslide.classify.targets import Target
    from cellslide.slides.inputs import SlideInput

AnyWork = TypeVar("AnyWork", bound="Work")
# So long (s) the command may take to end when all is done; Dask now and then never does.
END_S = 30.0

log = logging.getLogger(__name__)


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, _, count = value.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r}: must be I/N with I from 1 to N, such as 2/8")
    return int(number), int(count)


shard_option = click.option("--shard", metavar="I/N", callback=_shard, help="Only part I of N of the slides, I from 1.")

stage_option = click.option(
    "--stage-dir", type=FOLDER, metavar="DIR",
    help="Copy each slide to this local folder first, as far as it fits, and remove it after; slides at addresses are "
    "fetched to it.  [default for these: .stage in the output folder]",
)  # fmt: skip

strict_option = click.option(
    "--strict", is_flag=True, help='A slide whose verdict is "do not use" makes the command end with 1.'
)

cluster_options = chain(
    click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Slides at once on this machine, by Dask."),
    click.option(
        "--scheduler", metavar="ADDRESS_OR_FILE",
        help="Give the work to this Dask scheduler (tcp://host:8786, or its scheduler file).",
    ),
)  # fmt: skip


def copies_in(stage_dir: Path | None) -> LocalCopies | None:
    """Return where `--stage-dir` copies slides to, if it is given."""
    from cellslide.batch.local_copy import LocalCopies

    return None if stage_dir is None else LocalCopies(stage_dir)


def choose_slides(args: Sequence[str], output: Path, shard: tuple[int, int] | None = None) -> list[Target]:
    """Return the slides that the arguments name, of one shard if asked, with the folders of their results.

    Raises UsageError when they name none.
    """
    from cellslide.batch.run import in_shard
    from cellslide.classify.targets import Target
    from cellslide.slides.inputs import expand_slides

    def chosen(source: SlideInput) -> bool:
        return shard is None or in_shard(source.slide_id, shard)

    targets = [Target(source, output / source.slide_id) for source in expand_slides(args) if chosen(source)]
    if not targets:
        click.echo("no slide falls into this shard", err=True)
    return targets


def do_slides(
    work: AnyWork,
    targets: Sequence[Target],
    executor: SlideExecutor[AnyWork],
    output: Path,
    named: Iterable[str] = (),
    *,
    log_json: bool,
    no_progress: bool,
    strict: bool = False,
) -> int:
    """Do slides and show how they end: on the terminal, as lines of JSON, in summaries; return the exit code.

    named   folders of results that get a summary too.
    strict  a slide whose verdict is "do not use" ends the command with 1.
    """
    from cellslide.batch.executor import DaskWorkers
    from cellslide.batch.preflight import check_request, is_refused
    from cellslide.batch.run import StopOnSignal, failed
    from cellslide.batch.summary import Ledger, summary_folders
    from cellslide.batch.work import SlideWork
    from cellslide.cli.progress import progress_bar

    # The devices of Dask's workers are not those of this machine.
    here = work.on("auto", 1) if isinstance(executor, DaskWorkers) and isinstance(work, SlideWork) else work
    checked = check_request(here, targets, output)
    if is_refused(checked):
        return _refuse([failed(one.target.source, one.error, 0.0) for one in checked if one.error], log_json)
    ledger = Ledger(summary_folders(targets, output, map(Path, named)))
    shown = not no_progress and logging.getLogger("cellslide").isEnabledFor(logging.INFO)
    with (
        StopOnSignal(isinstance(executor, DaskWorkers)) as stop,
        progress_bar(len(targets), shown, work.stages) as progress,
    ):
        ended = executor.run(work, targets, progress.lane, stop)
        outcomes = _noted(ended, ledger, progress.ended, log_json)
    order = {target.source.slide_id: k for k, target in enumerate(targets)}
    code = _finish(sorted(outcomes, key=lambda outcome: order[outcome.slide]), ledger, log_json, strict)
    if isinstance(executor, DaskWorkers):
        _end_in_time(code)
    return code


def plan_slides(work: Work, targets: Sequence[Target], device: str, output: Path) -> int:
    """Check a request, print what it would do and what that takes, and return 0; nothing is written.

    Raises UsageError where it would be refused.
    """
    from cellslide.batch.plan import plan_request
    from cellslide.batch.preflight import check_request, is_refused
    from cellslide.batch.work import SlideWork
    from cellslide.errors import UsageError, in_words

    checked = check_request(work, targets, output)
    if is_refused(checked) and (error := checked[0].error) is not None:
        raise UsageError(in_words(error))
    if isinstance(work, SlideWork):
        for line in plan_request(work, checked, device, output):
            click.echo(line)
        return 0
    for one in checked:
        click.echo(f"{one.target.source.slide_id}  {one.state}  {one.error or ''}  {one.target.source.path}")
    click.echo(f"{len(checked)} slides; the files of their folders are written anew")
    return 0


def _noted(
    ended: Iterable[Ended], ledger: Ledger, show: Callable[[SlideOutcome], None], log_json: bool
) -> list[SlideOutcome]:
    """Note slides as they end; the summary is written at the end, also of a run that was stopped."""
    outcomes = []
    try:
        for target, outcome in ended:
            outcomes.append(outcome)
            ledger.keep(target, outcome)
            show(outcome)
            if log_json:
                click.echo(json.dumps({**outcome.to_json(), "seconds": round(outcome.seconds, 2)}))
            elif outcome.cells == 0 and outcome.status == "done":
                log.warning("%s: no nuclei; see tissue.geojson for what was searched", outcome.slide)
    finally:
        ledger.write()
    return outcomes


def _finish(outcomes: list[SlideOutcome], ledger: Ledger, log_json: bool, strict: bool) -> int:
    """Show the summary, the reasons of verdicts and the errors; return the exit code."""
    from cellslide.batch.run import exit_code
    from cellslide.batch.summary import PAGE_FILE
    from cellslide.cli.progress import reasons, summary

    if outcomes and all(outcome.refused for outcome in outcomes):
        return _refuse(outcomes, False)
    if logging.getLogger("cellslide").isEnabledFor(logging.INFO):
        summary(outcomes, to_stderr=log_json)
        for line in reasons(outcomes):
            click.echo(line, err=log_json)
        for folder in ledger.folders if len(outcomes) > 1 else ():
            click.echo(f"all slides at a glance: {folder / PAGE_FILE}", err=log_json)
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"cellslide: {' '.join(outcome.slide.splitlines())}: {outcome.error}", err=True)
        elif strict and outcome.unusable:
            click.echo(f"cellslide: {' '.join(outcome.slide.splitlines())}: do not use (--strict)", err=True)
    return exit_code(outcomes, strict)


def _refuse(outcomes: list[SlideOutcome], log_json: bool) -> int:
    """Say why a request suited not one slide, for the first of them; return the exit code."""
    from cellslide.batch.run import exit_code

    for outcome in outcomes if log_json else ():
        click.echo(json.dumps(outcome.to_json()))
    more = f" (and {len(outcomes) - 1} more slides)" if len(outcomes) > 1 else ""
    click.echo(f"cellslide: refused, nothing was changed: {outcomes[0].error}{more}", err=True)
    return exit_code(outcomes)


def _end_in_time(code: int) -> None:
    """See to it that the command ends with its exit code even where Dask's threads do not end."""

    def end() -> None:
        threading.main_thread().join()
        time.sleep(END_S)
        os._exit(code)

    sys.stdout.flush()
    threading.Thread(target=end, daemon=True).start()
