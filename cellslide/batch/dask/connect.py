"""A Dask scheduler to give stages to: one that runs already, or processes on this machine for as long as the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellslide import __version__
from cellslide.errors import MissingDependencyError, UsageError, in_words
from cellslide.inference.device import available_cpus

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

# Time (s) for a scheduler to answer, and for everything to close; Dask's closing now and then never ends.
ANSWER_S, CLOSE_S = 15, 20

# Workers have child processes that decode tiles. On a busy machine connections take their time, as does a worker that
# died until it is back; Dask would give it up after 15 s, for good.
SETTINGS = {
    "distributed.worker.daemon": False,
    "distributed.comm.timeouts.connect": "120s",
    "distributed.deploy.lost-worker-timeout": "1h",
}
# A process that has not come back by itself after so long (s) is started anew.
GONE_S = 120.0

log = logging.getLogger(__name__)


def require_dask() -> None:
    """Raise MissingDependencyError where Dask is not installed."""
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "--jobs and --scheduler need Dask: pip install 'cellslide[cluster]'; --shard I/N needs nothing"
        ) from error


@dataclass(frozen=True, slots=True)
class Cluster:
    """A client of a scheduler; `mend`, told now and then which workers there are, starts those anew that are gone."""

    client: Client
    mend: Callable[[Collection[object]], None] = lambda present: None


@contextmanager
def open_cluster(scheduler: str | None, jobs: int | None) -> Iterator[Cluster]:
    """Yield the scheduler at an address or named by a file, or one with `jobs` processes on this machine.

    Raises UsageError for an address that is none, MissingDependencyError where nobody answers.
    """
    require_dask()
    import dask

    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        cluster = Cluster(_found(scheduler)) if scheduler is not None else _started(jobs or 1, stack)
        try:
            yield cluster
        finally:
            _in_time(cluster.client.close)


def _found(scheduler: str) -> Client:
    from distributed import Client

    where: dict[str, Any] = {"address": scheduler}
    if "://" not in scheduler and (scheduler.endswith(".json") or os.sep in scheduler or Path(scheduler).exists()):
        if not Path(scheduler).is_file():
            raise UsageError(f"--scheduler {scheduler}: no such file; `dask scheduler --scheduler-file` writes it")
        where = {"scheduler_file": scheduler}
    try:
        client = Client(**where, set_as_default=False, timeout=ANSWER_S, name="cellslide")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--scheduler {scheduler}: no address such as tcp://host:8786, no file ({error})") from error
    except OSError as error:
        raise MissingDependencyError(
            f"--scheduler {scheduler}: no Dask scheduler answers there; start `dask scheduler`, or check the address"
        ) from error
    check_workers(client)
    return client


def check_workers(client: Client) -> None:
    """Warn of workers that may have no child processes, of which decoding tiles would take its time.

    Raises MissingDependencyError for a worker that has another version of cellslide, or none.
    """
    answers: dict[str, Any] = client.run(_describe, on_error="return")
    for address, answer in answers.items():
        if isinstance(answer, BaseException) or answer[0] != __version__:
            found = in_words(answer) if isinstance(answer, BaseException) else f"cellslide {answer[0]}"
            raise MissingDependencyError(f"worker {address}: {found}; it needs cellslide {__version__} as here")
    if any(daemonic for _, daemonic in answers.values()):
        log.warning(
            "workers decode tiles one at a time: start `dask worker` with DASK_DISTRIBUTED__WORKER__DAEMON=False, or "
            "with --no-nanny"
        )


def _describe() -> tuple[str, bool]:
    return __version__, bool(multiprocessing.current_process().daemon)


def _started(jobs: int, stack: ExitStack) -> Cluster:
    """Start processes on this machine that end with this one; other users cannot reach them."""
    from distributed import Client, SpecCluster

    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cellslide-dask-", ignore_cleanup_errors=True))
    security = _own_security()
    workers, scheduler = local_spec(jobs, visible_gpus(), scratch, security)
    cluster = SpecCluster(workers, scheduler, security=security, silence_logs=logging.ERROR)
    stack.callback(_in_time, cluster.close)
    client = Client(cluster, set_as_default=False, timeout=120, name="cellslide")
    return Cluster(client, LocalWorkers(cluster).mend)


class LocalWorkers:
    """The processes of `--jobs`, each watched by a nanny, which gives up on one that dies while it starts."""

    def __init__(self, cluster: SpecCluster) -> None:
        self._cluster, self._gone = cluster, dict[object, float]()

    def mend(self, present: Collection[object]) -> None:
        """Start those anew that are not among `present`, by name, and have no process any more."""
        now, dead = time.monotonic(), []
        for name in self._cluster.worker_spec:
            nanny = self._cluster.workers.get(name)
            if name in present or (nanny is not None and nanny.is_alive()):
                self._gone.pop(name, None)
            elif now - self._gone.setdefault(name, now) > GONE_S:
                dead.append(name)
        for name in dead:
            log.warning("process %s did not come back; it is started anew", name)
            del self._gone[name]
            self._cluster.workers.pop(name, None)
        if dead:
            self._cluster.scale(len(self._cluster.worker_spec))


def local_spec(
    jobs: int, gpus: list[str], scratch: str, security: Any = None
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Return Dask's description of `jobs` workers on this machine and of their scheduler.

    Each GPU goes to one worker; with more workers than GPUs, the others write what was found.
    """
    from distributed import Nanny, Scheduler

    protocol = "tcp://" if security is None else "tls://"
    # Memory is bounded by how cellslide works, and much of it Dask cannot see: its limits would only stall.
    common = {"nthreads": 1, "memory_limit": 0, "local_directory": scratch, "security": security, "protocol": protocol}
    common |= {"host": "127.0.0.1", "dashboard": False, "silence_logs": logging.ERROR}
    common |= {"preload": ["cellslide.batch.dask.local_worker"]}
    workers: dict[int, dict[str, Any]] = {}
    for k in range(jobs):
        env = {"CUDA_VISIBLE_DEVICES": gpus[k]} if k < len(gpus) else {}
        resources = {"CPU": 1, "GPU": 1} if k < len(gpus) or not gpus else {"CPU": 1}
        workers[k] = {"cls": Nanny, "options": {**common, "env": env, "resources": resources}}
    options = {"host": "127.0.0.1", "port": 0, "protocol": protocol, "dashboard": False, "security": security}
    options["dashboard_address"] = "127.0.0.1:0"
    return workers, {"cls": Scheduler, "options": options}


def visible_gpus() -> list[str]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()][:count]
    return [str(k) for k in range(count)]


def _own_security() -> Any:
    """Return keys that only this run has; None, with a warning, where the package that makes them is missing."""
    from distributed.security import Security

    try:
        return Security.temporary()
    except ImportError:
        log.warning("other users of this machine could reach --jobs: pip install 'cellslide[cluster]' closes that")
        return None


def share_of_cores(jobs: int) -> int:
    """Return the cores that each of `jobs` processes may use, of those granted to this one."""
    return max(1, available_cpus() // jobs)


def _in_time(close: Callable[[], object]) -> None:
    """Call what closes something, and leave it behind where it does not end."""

    def end() -> None:
        try:
            close()
        except Exception as error:
            # All results are on disk by now.
            log.debug("%s: %s", close, error)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(CLOSE_S)
    if thread.is_alive():
        log.debug("%s does not end; it is left behind", close)
