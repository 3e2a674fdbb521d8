"""Slides through Dask: a real cluster of two processes, and its owner with workers that misbehave on purpose."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.batch.dask import retries as guard
from cellslide.batch.dask import stages
from cellslide.batch.dask.connect import Cluster, LocalWorkers, open_cluster
from cellslide.batch.dask.paths import absolute
from cellslide.batch.dask.retries import guarded
from cellslide.batch.dask.scheduler import over_cluster
from cellslide.batch.dask.stages import Handed, Job, Stage, StageEnd, do_stage
from cellslide.batch.executor import Inline, choose_executor
from cellslide.batch.run import STOPPING, SlideOutcome
from cellslide.batch.work import SegmentWork, SlideWork
from cellslide.classify.targets import Target
from cellslide.cli.main import cli
from cellslide.config import InferConfig, SegmentConfig, TissueConfig
from cellslide.errors import CellslideError, Interrupted, SlideError, UsageError
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.progress import Silent, Watch
from cellslide.slides.inputs import SlideInput
from cellslide.store.atomic import write_json
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.store.tile_checkpoint import PARTS_FOLDER
from tests.painted import paint_slide
from tests.support.cluster_fakes import POISON, load_deadly, load_fake_classifier

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'cellslide[cluster]'")

CONFIG = SegmentConfig(
    tissue=TissueConfig(enabled=False), infer=InferConfig(device="cpu", workers=0, precision="fp32", batch_size=1)
)
JOB = Job("run", SlideWork(SegmentWork(CONFIG, load_deadly)))
CENTRES = [(60, 60), (180, 120), (300, 200)]


def target(path: Path, out: Path) -> Target:
    return Target(SlideInput(path, slide_id=path.stem), out / path.stem)


def nobody(number: int) -> Silent:
    return Silent()


def never() -> None:
    return None


def cells_of(folder: Path) -> np.ndarray:
    with open_table(folder / "cells.zarr") as table:
        return np.stack([table.vector(name).astype(float) for name in ("cell_id", "x", "y", "area_um2")])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slide_that_kills_its_workers_fails_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b", "poison"):
        paint_slide(
            tmp_path / f"{name}.tif", 400, 300, 0.5, CENTRES, 7.0, (1,),
            disc_color=POISON if name == "poison" else (95, 55, 140),
        )  # fmt: skip
    (tmp_path / "bad.tif").write_bytes(b"no slide")
    names = ("poison", "a", "bad", "b")
    targets = [target(tmp_path / f"{name}.tif", out) for name in names]
    with open_cluster(None, 2) as cluster:
        client = cluster.client
        info = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [worker["nthreads"] for worker in info] == [1, 1] and all(worker["resources"]["CPU"] for worker in info)
        assert set(client.run(_heeds_signals).values()) == {False}
        outcomes = {o.slide: o for _, o in over_cluster(cluster, replace(JOB, deaths=1), targets, nobody, never)}
    assert {name: outcomes[name].status for name in names} == {
        "a": "done", "b": "done", "bad": "failed", "poison": "failed",
    }  # fmt: skip
    assert "workers died 1 times" in str(outcomes["poison"].error)
    assert read_record(out / "poison").status == "failed" and "memory" in read_record(out / "poison").error
    with open_segmenter(load_deadly(), CONFIG) as segmenter:
        segment_slide(targets[1].source, segmenter, tmp_path / "here")
    assert read_record(out / "bad").status == "failed"
    for name in ("a", "b"):
        assert np.array_equal(cells_of(out / name), cells_of(tmp_path / "here" / "a"))
        assert read_record(out / name).status == "done" and not list((out / name).glob(".*"))


def _heeds_signals() -> bool:
    return any(signal.getsignal(number) is not signal.SIG_IGN for number in STOPPING)


@dataclass
class FakeFuture:
    """A future that is what it was made as."""

    status: str
    value: Any = None

    def done(self) -> bool:
        return self.status != "pending"

    def result(self, timeout: float) -> Any:
        return self.value

    def exception(self) -> Any:
        return self.value

    def __hash__(self) -> int:
        return id(self)


class FakeClient:
    """Answers each stage by what `answer` gives for it, as a scheduler with two tagged workers."""

    def __init__(self, answer: Callable[[Stage, str], FakeFuture]) -> None:
        self.answer, self.status = answer, "running"
        self.sent: list[tuple[Stage, str, Any]] = []
        self.most = self.stopped = self.pending = 0

    def subscribe_topic(self, topic: str, hear: Callable[[Any], None]) -> None:
        hear((0.0, {"slide": "nobody", "what": "advance", "values": [1]}))

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        gpu, cpu = ({"nthreads": 1, "resources": {name: 1.0}} for name in ("GPU", "CPU"))
        return {"workers": {"g0": gpu, "g1": gpu, "c": cpu}}

    def submit(self, function: Any, stage: Stage, target: Target, job: Job, handed: Handed, **how: Any) -> FakeFuture:
        self.sent.append((stage, target.source.slide_id, how["resources"]))
        future = self.answer(stage, target.source.slide_id)
        self.pending += not future.done()
        self.most = max(self.most, self.pending)
        return future

    def run(self, function: Any, *arguments: Any, **how: Any) -> None:
        self.stopped += 1

    def cancel(self, futures: Any) -> None:
        pass


def ends(outcome: SlideOutcome | None = None, **fields: Any) -> FakeFuture:
    return FakeFuture("finished", StageEnd(outcome=outcome, **fields))


def done(slide: str) -> FakeFuture:
    return ends(SlideOutcome(slide, "done", 1, 0.0))


def drive(client: FakeClient, out: Path, *names: str, stop: Any = never) -> dict[str, SlideOutcome]:
    pairs = over_cluster(Cluster(client), JOB, [target(out / f"{name}.tif", out) for name in names], nobody, stop)
    return {t.source.slide_id: o for t, o in pairs}


def test_stages_go_where_their_tags_are(tmp_path: Path) -> None:
    client = FakeClient(lambda stage, slide: ends(next=Stage.WRITE) if stage is Stage.FIND else done(slide))
    assert {o.status for o in drive(client, tmp_path, "a", "b", "c").values()} == {"done"}
    assert [r for stage, _, r in client.sent if stage is Stage.FIND] == [{"GPU": 1}] * 3
    assert [r for stage, _, r in client.sent if stage is Stage.WRITE] == [{"CPU": 1}] * 3
    # What is nearly done goes before what has not begun.
    assert client.sent.index((Stage.WRITE, "a", {"CPU": 1})) < client.sent.index((Stage.FIND, "c", {"GPU": 1}))


def test_no_more_is_handed_out_than_there_is_room_for(tmp_path: Path) -> None:
    client = FakeClient(lambda stage, slide: FakeFuture("pending"))
    calls = iter([None, None, None, 143])
    with pytest.raises(Interrupted) as stopped:
        client.cancel = lambda futures: [setattr(f, "status", "cancelled") for f in futures]  # type: ignore[method-assign]
        client.run = lambda *a, **k: setattr(client, "status", "closed")  # type: ignore[method-assign]
        drive(client, tmp_path, *"abcde", stop=lambda: next(calls))
    assert stopped.value.exit_code == 143 and client.most == 2


def test_a_slide_that_was_blamed_for_another_is_done_again(tmp_path: Path) -> None:
    def killed() -> FakeFuture:
        return FakeFuture("error", distributed.KilledWorker("k", SimpleNamespace(address="w"), 3))

    answers = {"a": [killed(), done("a")], "b": [killed(), killed(), done("b")]}
    outcomes = drive(FakeClient(lambda stage, slide: answers[slide].pop(0)), tmp_path, "a", "b")
    assert outcomes["a"].status == "done"
    assert outcomes["b"].status == "failed" and "died" in str(outcomes["b"].error) and outcomes["b"].exit_code == 1


def test_a_lost_scheduler_names_what_is_left(tmp_path: Path) -> None:
    def answer(stage: Stage, slide: str) -> FakeFuture:
        if slide == "b":
            client.status = "connecting"
            return FakeFuture("cancelled")
        return done(slide)

    client = FakeClient(answer)
    outcomes = drive(client, tmp_path, "a", "b", "c", "d")
    assert {k: o.status for k, o in outcomes.items()} == {"a": "done", "b": "failed", "c": "failed", "d": "failed"}
    assert "scheduler was lost" in str(outcomes["d"].error) and outcomes["d"].exit_code == 1


def test_other_errors_are_the_slides_or_everybodys(tmp_path: Path) -> None:
    gone = FakeFuture("error", OSError(5, "Input/output error"))
    outcomes = drive(FakeClient(lambda stage, slide: gone if slide == "a" else done(slide)), tmp_path, "a", "b")
    assert outcomes["a"].status == "failed" and outcomes["b"].status == "done"
    client = FakeClient(lambda stage, slide: ends(fatal=("no such weights (worker on node7)", 3)))
    with pytest.raises(CellslideError, match="node7") as error:
        drive(client, tmp_path, "a", "b")
    assert error.value.exit_code == 3 and len(client.sent) <= 2


def test_a_slide_that_is_given_back_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.batch.dask.scheduler.AGAIN_S", 0.0)
    answers = [FakeFuture("cancelled"), ends(undone=True), done("a")]
    assert drive(FakeClient(lambda *_: answers.pop(0)), tmp_path, "a")["a"].status == "done"
    outcome = drive(FakeClient(lambda *_: ends(undone=True)), tmp_path, "a")["a"]
    assert outcome.status == "failed" and "another run" in str(outcome.error)


def test_guard_counts_deaths_without_progress(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / PARTS_FOLDER).mkdir(parents=True)

    def die(run_id: str = "run") -> None:
        """Begin a stage and do not come to its end."""
        kept.append(guarded(folder, run_id, "find"))
        kept[-1].__enter__()

    kept: list[Any] = []
    for _ in range(guard.MOST):
        die()
    (folder / PARTS_FOLDER / "part-00000000.npz").write_bytes(b"")
    for _ in range(guard.MOST):
        die()
    with pytest.raises(SlideError, match="--workers 1"):
        die()
    die("another run")
    with guarded(folder, "run", "find") as times:
        assert times == 1
    assert not (folder / guard.FILE).exists()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stages run in this process, which is no worker of Dask."""
    monkeypatch.setattr(stages, "watching", lambda *_: Watch())
    monkeypatch.setattr(stages, "_networks", stages._Networks())
    yield


def test_stages_end_as_the_slide_does_in_one_go(here: None, tmp_path: Path) -> None:
    slide = paint_slide(tmp_path / "a.tif", 400, 300, 0.5, CENTRES, 7.0, (1,))
    there = target(slide.path, tmp_path)
    found = do_stage(Stage.FIND, there, JOB, Handed())
    assert found.next is Stage.WRITE and found.outcome is None and read_record(there.folder).status == "running"
    # A result that got lost on its way is made again from what is on disk.
    again = do_stage(Stage.FIND, there, JOB, Handed())
    for _ in range(2):
        written = do_stage(Stage.WRITE, there, JOB, again.handed)
        assert written.outcome.status == "done" and written.outcome.cells == len(CENTRES)
        assert (there.folder / "report.html").is_file()
    assert do_stage(Stage.FIND, there, JOB, Handed()).outcome.status == "skipped"


class InProcess(FakeClient):
    """Does each stage at once, in this process; what it is given and gives passes through pickle."""

    def __init__(self) -> None:
        super().__init__(lambda *_: FakeFuture("finished"))

    def submit(self, function: Any, *given: Any, **how: Any) -> FakeFuture:
        super().submit(function, *given, **how)
        return FakeFuture("finished", pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(given))))))


def test_run_with_jobs_is_run_without(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = InProcess()
    monkeypatch.setattr("cellslide.batch.dask.connect.open_cluster", lambda *_: nullcontext(Cluster(client)))
    monkeypatch.setattr("cellslide.weights.load_model", load_deadly)
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", load_fake_classifier)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        paint_slide(tmp_path / f"{name}.tif", 400, 300, 0.5, CENTRES, 7.0, (1,))
    (tmp_path / "bad.tif").write_bytes(b"no slide")
    flags = ("--no-tissue", "--device", "cpu", "--workers", "0", "--organ", "breast", "--log-json", "--no-progress")
    slides = ("b.tif", "bad.tif", "a.tif")
    results = [
        CliRunner().invoke(cli, ["run", *slides, "-o", out, *flags, *more])
        for out, more in (("plain", ()), ("dask", ("--jobs", "2")), ("dask", ("--jobs", "2")))
    ]
    assert [result.exit_code for result in results] == [1, 1, 1], results[1].output
    told = [
        sorted((o["slide"], o["status"], o["cells"]) for o in map(json.loads, r.stdout.splitlines())) for r in results
    ]
    assert told[0] == told[1] == [("a", "done", 3), ("b", "done", 3), ("bad", "failed", None)]
    assert told[2] == [("a", "skipped", 3), ("b", "skipped", 3), ("bad", "failed", None)]
    assert {stage for stage, slide, _ in client.sent if slide == "a"} == set(Stage)
    for name in ("a", "b"):
        tables = [open_table(tmp_path / out / name / "cells.zarr") for out in ("plain", "dask")]
        for column in ("x", "y", "class_prob", "gate"):
            assert np.array_equal(*(table.vector(column) for table in tables), equal_nan=True), column
        assert {p.name for p in (tmp_path / "dask" / name).iterdir()} == {
            p.name for p in (tmp_path / "plain" / name).iterdir()
        }


def test_a_stage_says_whose_fault_it_is(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = paint_slide(tmp_path / "a.tif", 400, 300, 0.5, CENTRES, 7.0, (1,))
    there = target(slide.path, tmp_path)
    other = do_stage(Stage.FIND, there, replace(JOB, version="0"), Handed())
    assert other.fatal[1] == 3 and "worker on" in other.fatal[0]
    unseen = do_stage(Stage.FIND, target(slide.path, tmp_path / "elsewhere"), JOB, Handed())
    assert unseen.fatal[1] == 3 and "--output" in unseen.fatal[0]
    wrong = replace(JOB, run_id="wrong", work=SlideWork(SegmentWork(CONFIG, _no_weights)))
    assert do_stage(Stage.FIND, there, wrong, Handed()).fatal == (f"no weights (worker on {os.uname().nodename})", 2)
    monkeypatch.setattr(stages, "run_slide", _hiccup)
    with pytest.raises(OSError, match="stale"):
        do_stage(Stage.FIND, there, JOB, Handed())
    assert not (there.folder / guard.FILE).exists()


def _no_weights(*_: object) -> None:
    raise UsageError("no weights")


def _hiccup(*_: object, **__: object) -> None:
    raise OSError(116, "stale file handle")


class FakeSpec:
    """Two watched processes, by name; the second one is dead. Starting one anew makes it alive."""

    def __init__(self) -> None:
        self.workers = {k: SimpleNamespace(is_alive=lambda k=k: k == 0) for k in range(2)}
        self.worker_spec = dict.fromkeys(range(2))

    def scale(self, n: int) -> None:
        assert n == 2
        self.workers |= {k: SimpleNamespace(is_alive=lambda: True) for k in self.worker_spec if k not in self.workers}


def test_a_process_that_stays_away_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, now = FakeSpec(), [0.0]
    monkeypatch.setattr("cellslide.batch.dask.connect.time", SimpleNamespace(monotonic=lambda: now[0]))
    local, second = LocalWorkers(spec), spec.workers[1]
    local.mend({0})
    now[0] = 119.0
    local.mend({0})
    assert spec.workers[1] is second
    now[0] = 121.0
    local.mend({0})
    assert spec.workers[1] is not second and spec.workers[1].is_alive()


def test_gpus_go_to_one_worker_each() -> None:
    from cellslide.batch.dask.connect import local_spec

    workers, _ = local_spec(3, ["2", "5"], "scratch")
    assert [w["options"]["env"] for w in workers.values()] == [
        {"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}, {},
    ]  # fmt: skip
    assert [sorted(w["options"]["resources"]) for w in workers.values()] == [["CPU", "GPU"], ["CPU", "GPU"], ["CPU"]]
    assert sorted(local_spec(1, [], "scratch")[0][0]["options"]["resources"]) == ["CPU", "GPU"]


def test_visible_devices_and_cores_are_those_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellslide.batch.dask.connect import share_of_cores, visible_gpus

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert visible_gpus() == ["4", "7"]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(20)))
    assert share_of_cores(8) == 2 and share_of_cores(64) == 1


def test_where_the_work_goes() -> None:
    assert choose_executor(("cpu",)) == Inline("cpu")
    with pytest.raises(UsageError, match="--jobs and --scheduler"):
        choose_executor(("cpu",), "tcp://a:1", 2)
    with pytest.raises(UsageError, match="--device"):
        choose_executor(("cuda:0", "cuda:1"), None, 2)


@pytest.mark.parametrize(
    ("scheduler", "code", "words"),
    [("tcp://127.0.0.1:9", 3, "no Dask scheduler answers"), ("gone.json", 2, "no such file")],
)
def test_a_scheduler_that_is_not_there(scheduler: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.batch.dask.connect.ANSWER_S", 1)
    with pytest.raises(CellslideError, match=words) as error, open_cluster(scheduler, None):
        pass
    assert error.value.exit_code == code


def test_paths_are_those_of_the_one_who_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = absolute(target(Path("a.tif"), Path("out")))
    assert there.source.path == tmp_path / "a.tif" and there.folder == tmp_path / "out" / "a"
    config = absolute(SegmentConfig(tissue=TissueConfig(roi=Path("r.geojson"))))
    assert config.tissue.roi == tmp_path / "r.geojson" and config.model is None


def test_a_record_of_another_kind_is_no_begun_stage(tmp_path: Path) -> None:
    write_json(tmp_path / guard.FILE, {"other": 1})
    assert guard.read_begun(tmp_path / guard.FILE) is None
    (tmp_path / guard.FILE).write_text(json.dumps([1]))
    with guarded(tmp_path, "run", "find") as times:
        assert times == 1
