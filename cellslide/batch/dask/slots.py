"""How much the workers of a scheduler can do at once: by the resources GPU and CPU where they have them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from cellslide.batch.dask.connect import Cluster

TAGS = ("GPU", "CPU")
# Workers come and go; they are counted so often (s).
COUNT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Slots:
    """Stages that fit at once by tag, and which tags any worker has; without a tag each thread does one."""

    slots: Counter[str] = field(default_factory=Counter)
    tags: frozenset[str] = frozenset()
    counted: float = 0.0
    told: bool = False

    def count(self, cluster: Cluster) -> None:
        """Ask the scheduler for its workers, now and then; says so where there are none."""
        if self.counted and time.monotonic() - self.counted < COUNT_S:
            return
        try:
            workers = list(cluster.client.scheduler_info(n_workers=-1)["workers"].values())
        except (OSError, KeyError, ValueError):
            return  # A scheduler that is gone shows in the client's status.
        self.counted = time.monotonic()
        cluster.mend({worker.get("name") for worker in workers})
        threads = sum(worker["nthreads"] for worker in workers)
        found = {tag: int(sum(worker["resources"].get(tag, 0) for worker in workers)) for tag in TAGS}
        self.tags = frozenset(tag for tag in TAGS if found[tag])
        self.slots = Counter({tag: found[tag] or threads for tag in TAGS})
        if not threads and not self.told:
            log.warning("no worker has come yet; waiting")
        self.told = not threads

    def resources(self, tag: str) -> dict[str, float] | None:
        """Return what to ask of a worker for a stage of a tag; None where no worker has that tag."""
        return {tag: 1} if tag in self.tags else None
