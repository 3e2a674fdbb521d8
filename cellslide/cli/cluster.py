"""The options `--jobs` and `--scheduler` and what they do: slides through Dask, on this machine or on many."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import click

from cellslide.cli.many import RunOutput, told, watched
from cellslide.cli.options import chain
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.batch.run import SlideOutcome
    from cellslide.batch.worker_jobs import ClassifyWork, SegmentWork
    from cellslide.classify.targets import Target

# So long (s) the command may take to end when all is done; Dask now and then never does.
END_S = 30.0

cluster_options = chain(
    click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Slides at once on this machine, by Dask."),
    click.option(
        "--scheduler", metavar="ADDRESS_OR_FILE",
        help="Give the work to this Dask scheduler (tcp://host:8786, or its scheduler file).",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where slides are worked on: by a scheduler, or by so many processes here."""

    scheduler: str | None
    jobs: int | None


def place_of(scheduler: str | None, jobs: int | None, devices: Sequence[str]) -> Place | None:
    """Return where `--jobs` or `--scheduler` send the work; None where neither is given.

    Raises UsageError where both are, or several devices: a worker has one.
    """
    if scheduler is None and jobs is None:
        return None
    if scheduler is not None and jobs is not None:
        raise UsageError(
            "--jobs and --scheduler: give one of them; the scheduler's workers decide how many slides run at once"
        )
    if len(devices) > 1:
        raise UsageError("--device: name one; the workers of --jobs and --scheduler share the devices by themselves")
    return Place(scheduler, jobs)


def on_cluster(
    place: Place, segment: SegmentWork | None, classify: ClassifyWork | None, targets: Sequence[Target], tell: RunOutput
) -> list[SlideOutcome]:
    """Find the nuclei of slides, type them, or both, by Dask; returns how each ended, in the order of the slides."""
    from cellslide.batch.dask.connect import open_cluster, require_dask, share_of_cores
    from cellslide.batch.dask.paths import absolute
    from cellslide.batch.dask.scheduler import over_cluster
    from cellslide.batch.dask.stages import Job

    require_dask()
    targets = [absolute(target) for target in targets]
    for folder in dict.fromkeys(target.folder.parent for target in targets):
        folder.mkdir(parents=True, exist_ok=True)
    threads = None if place.jobs is None else share_of_cores(place.jobs)
    segment = None if segment is None else absolute(shared(segment, place.jobs))
    classify = None if classify is None else absolute(shared(classify, place.jobs))
    job = Job(uuid.uuid4().hex[:12], segment, classify, threads)
    stages = (segment is not None) + (classify is not None)
    with (
        watched(len(targets), tell.shown, stages) as (progress, stop),
        open_cluster(place.scheduler, place.jobs) as cluster,
    ):
        outcomes = told(over_cluster(cluster, job, targets, progress.lane, stop), tell, progress)
    order = {target.source.slide_id: k for k, target in enumerate(targets)}
    return sorted(outcomes, key=lambda outcome: order[outcome.slide])


Work = TypeVar("Work", "SegmentWork", "ClassifyWork")


def shared(work: Work, jobs: int | None) -> Work:
    """Return the work of one of `jobs` processes on this machine, which decodes on its share of the cores."""
    from cellslide.batch.worker_jobs import on_device

    if jobs is None:
        return work
    infer = work.config.infer
    return replace(work, config=replace(work.config, infer=on_device(infer, infer.device, jobs)))


def ended(code: int) -> int:
    """Return the exit code, and see to it that the command ends with it even where Dask's threads do not."""

    def end() -> None:
        threading.main_thread().join()
        time.sleep(END_S)
        os._exit(code)

    sys.stdout.flush()
    threading.Thread(target=end, daemon=True).start()
    return code
