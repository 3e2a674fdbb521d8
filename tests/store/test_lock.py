"""One run at a time on a folder: who comes second is told, what a dead run held is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cellslide.errors import BusyError, CellslideError, Interrupted
from cellslide.inference.segmenter import open_segmenter
from cellslide.store import lock
from cellslide.store.atomic import Staging
from cellslide.store.lock import PREFIX, STALE_S, hold
from cellslide.store.recovery import put_back, restore
from tests.conftest import CHECKOUT
from tests.painted import paint_slide
from tests.support.fakes import fake_model
from tests.test_pipeline import BASE, segment_slides, source


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


def leave(folder: Path, **changes: object) -> Path:
    """Put down the file of another run."""
    holder = {"host": "elsewhere", "pid": 1, "began": 0.0, "space": "another boot", **changes}
    path = folder / f"{PREFIX}00ff"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(holder))
    return path


def test_a_held_folder_is_refused_and_free_afterwards(tmp_path: Path) -> None:
    with hold(tmp_path / "s") as held:
        held.check()
        with pytest.raises(BusyError, match=f"process {os.getpid()}.*--output") as refused:
            hold(tmp_path / "s").__enter__()
        assert refused.value.exit_code == 1
        assert files(tmp_path / "s") == [held.path]
    assert not (tmp_path / "s").exists()  # as it was before
    with hold(tmp_path / "s"):
        (tmp_path / "s" / "a").touch()
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a"]


def test_a_process_killed_while_it_asks_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from cellslide.store.lock import hold\n"
    code += "os.replace = lambda *names: os.kill(os.getpid(), 9)\nhold(Path(sys.argv[1])).__enter__()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, timeout=60, check=False)
    assert done.returncode == -9 and len(files(tmp_path)) == 1
    other = tmp_path / f"{PREFIX}0.{os.getpid()}.elsewhere.tmp"
    other.touch()
    with hold(tmp_path) as held:
        assert files(tmp_path) == sorted([held.path, other])


def test_a_killed_process_leaves_a_lock_that_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = "import os, sys; from pathlib import Path; from cellslide.store.lock import hold\n"
    code += "with hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, timeout=60, check=False)
    assert len(files(tmp_path)) == 1
    with hold(tmp_path) as held:
        assert files(tmp_path) == [held.path]
    assert "taken over from a run that ended without a word" in caplog.text


def test_a_process_that_only_has_the_number_is_not_the_holder(tmp_path: Path) -> None:
    leave(tmp_path, pid=os.getpid(), began=1.0, space=lock._space())
    with hold(tmp_path):
        pass


def test_a_silent_run_elsewhere_is_taken_over_a_live_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    path = leave(tmp_path)
    past = time.time() - STALE_S - 5
    os.utime(path, (past, past))
    with hold(tmp_path) as held:
        assert files(tmp_path) == [held.path]
    path = leave(tmp_path)
    turns = [0]

    def beats() -> None:
        turns[0] += 1
        if turns[0] == 4:
            os.utime(path, (time.time() + 1, time.time() + 1))

    with pytest.raises(BusyError, match="host elsewhere, process 1"):
        hold(tmp_path, beats).__enter__()
    assert turns[0] == 4 and files(tmp_path) == [path]


def test_waiting_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_S", 0.01)
    path, turns = leave(tmp_path), [0]

    def stop() -> None:
        turns[0] += 1
        if turns[0] == 3:
            raise Interrupted(143)

    with pytest.raises(Interrupted):
        hold(tmp_path, stop).__enter__()
    assert files(tmp_path) == [path]


def test_a_run_that_lost_its_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with hold(tmp_path) as held:
        before = held.path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while held.path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        held.check()
        held.path.unlink()
        held._thread.join(10)
        with pytest.raises(CellslideError, match="its lock was removed"):
            held.check()


def test_of_many_at_once_no_two_hold_it(tmp_path: Path) -> None:
    inside, most, held = [0], [0], [0]
    count = threading.Lock()

    def come() -> None:
        for _ in range(5):
            try:
                with hold(tmp_path):
                    with count:
                        inside[0] += 1
                        held[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.002)
                    with count:
                        inside[0] -= 1
            except BusyError:
                continue

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most[0] == 1 and held[0] >= 5 and files(tmp_path) == []


def test_a_slide_in_work_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    paint_slide(path, 300, 200, 0.5, [(100, 100)], 7.0, (1,))
    with open_segmenter(fake_model(), BASE) as segmenter:
        with hold(tmp_path / "out" / "s") as held:
            (outcome,) = segment_slides([source(path)], segmenter, tmp_path / "out")
            assert outcome.status == "failed" and outcome.exit_code == 1 and "another run works" in str(outcome.error)
            assert list((tmp_path / "out" / "s").iterdir()) == [held.path]
        (outcome,) = segment_slides([source(path)], segmenter, tmp_path / "out")
    assert outcome.status == "done"


def test_what_a_kill_between_two_renames_moved_away_comes_back(tmp_path: Path) -> None:
    folder, table = tmp_path / "s", tmp_path / "s" / "cells.zarr"
    for name in ("cells.zarr.old-77", "cells.zarr.tmp-77", "labels.ome.zarr.old-77", "labels.ome.zarr", ".parts.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "from.txt").write_text(name)
    (folder / ".run.json.77.tmp").write_text("{")
    (folder / "cells.csv.gz.tmp-77").write_text("half")
    with hold(folder):
        put_back(tmp_path, "cells.zarr")
        assert not table.exists()  # somebody may be about to rename it
    put_back(tmp_path, "cells.zarr")
    assert (table / "from.txt").read_text() == "cells.zarr.old-77"
    assert sorted(p.name for p in folder.iterdir()) == ["cells.zarr", "labels.ome.zarr"]
    assert (folder / "labels.ome.zarr" / "from.txt").read_text() == "labels.ome.zarr"
    restore(folder)
    staging = Staging(table)
    staging.folder.mkdir()
    staging.publish()
    assert list(table.iterdir()) == [] and len(list(folder.iterdir())) == 2
