"""Where the slides of a run are worked on: in this process, in a process a device, or by the workers of Dask."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from cellslide.batch.workers import Work, over_devices
from cellslide.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from cellslide.batch.run import SlideOutcome
    from cellslide.batch.work import SlideWork
    from cellslide.classify.targets import Target
    from cellslide.progress import Progress, StopCheck

Ended = tuple["Target", "SlideOutcome"]
LaneOf = Callable[[int], "Progress"]
WorkT = TypeVar("WorkT", bound=Work, contravariant=True)


class SlideExecutor(Protocol[WorkT]):
    """Does slides and yields each with how it ended, as they end.

    lane_of  gives the progress of the k-th of the slides that are worked on at once.
    Raises Interrupted when asked to stop, and what no slide would escape.
    """

    def run(self, work: WorkT, targets: Sequence[Target], lane_of: LaneOf, stop: StopCheck) -> Iterator[Ended]:
        """Do the slides."""


@dataclass(frozen=True, slots=True)
class Inline:
    """One slide after another in this process."""

    device: str

    def run(self, work: Work, targets: Sequence[Target], lane_of: LaneOf, stop: StopCheck) -> Iterator[Ended]:
        """Do the slides in order."""
        with work.open(self.device, 1) as handle:
            for target in targets:
                if (code := stop()) is not None:
                    raise Interrupted(code)
                yield target, handle(target, lane_of(0), stop)


@dataclass(frozen=True, slots=True)
class DeviceProcesses:
    """A process a device of this machine; each takes the next slide when it is done with one."""

    devices: tuple[str, ...]

    def run(self, work: SlideWork, targets: Sequence[Target], lane_of: LaneOf, stop: StopCheck) -> Iterator[Ended]:
        """Do the slides as devices are free."""
        return over_devices(work, targets, self.devices, lane_of, stop)


@dataclass(frozen=True, slots=True)
class DaskWorkers:
    """The workers of a Dask scheduler, or so many processes on this machine."""

    scheduler: str | None
    jobs: int | None

    def run(self, work: SlideWork, targets: Sequence[Target], lane_of: LaneOf, stop: StopCheck) -> Iterator[Ended]:
        """Do the slides stage by stage, results through disk."""
        from cellslide.batch.dask.connect import open_cluster, require_dask, share_of_cores
        from cellslide.batch.dask.paths import absolute
        from cellslide.batch.dask.scheduler import over_cluster
        from cellslide.batch.dask.stages import Job

        require_dask()
        targets = [absolute(target) for target in targets]
        for folder in dict.fromkeys(target.folder.parent for target in targets):
            folder.mkdir(parents=True, exist_ok=True)
        threads = None if self.jobs is None else share_of_cores(self.jobs)
        job = Job(uuid.uuid4().hex[:12], absolute(work.on(None, self.jobs or 1)), threads)
        with open_cluster(self.scheduler, self.jobs) as cluster:
            yield from over_cluster(cluster, job, targets, lane_of, stop)


def choose_executor(
    devices: tuple[str, ...], scheduler: str | None = None, jobs: int | None = None
) -> SlideExecutor[SlideWork]:
    """Return where `--device`, `--scheduler` and `--jobs` send the work; raises UsageError where they do not agree."""
    if scheduler is None and jobs is None:
        return Inline(devices[0]) if len(devices) == 1 else DeviceProcesses(devices)
    if scheduler is not None and jobs is not None:
        raise UsageError(
            "--jobs and --scheduler: give one of them; the scheduler's workers decide how many slides run at once"
        )
    if len(devices) > 1:
        raise UsageError("--device: name one; the workers of --jobs and --scheduler share the devices by themselves")
    return DaskWorkers(scheduler, jobs)
