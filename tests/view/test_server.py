"""The viewer's server: where it listens, whom it answers, what it gives out, and that its numbers are the table's."""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cellslide.classify.decision import DecisionConfig, decide
from cellslide.cli.view import command
from cellslide.errors import MissingDependencyError, UsageError
from cellslide.slides.slide import open_slide
from cellslide.store import shapes as spatial
from cellslide.store.cell_table import open_table
from cellslide.types import PathProbs
from cellslide.view import answers
from cellslide.view import cells as view_cells
from cellslide.view import rule as view_policy
from cellslide.view import server as view_server
from cellslide.view import slide as scene_module
from cellslide.view.answers import Answer, Viewer
from cellslide.view.arrays import pack
from cellslide.view.cells import CellIndex, density
from cellslide.view.folders import find_slides
from cellslide.view.lru_cache import LruCache
from cellslide.view.rule import DecisionRule, Decisions, StoredRule
from cellslide.view.server import LOOPBACK, MOST_CONNECTIONS, Server, open_server
from tests.conftest import CHECKOUT
from tests.support.random_cells import as_kind, ellipses, model_spec, write_table
from tests.viewed import CALIBRATION, CLASSES, HEIGHT, RADIUS, WIDTH, Viewed, serving, write_viewed

WHOLE = f"x0=0&y0=0&x1={WIDTH}&y1={HEIGHT}"


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    """Return a typed slide's folder; no test may change it."""
    return write_viewed(tmp_path_factory.mktemp("viewed") / "out")


@pytest.fixture()
def viewer(viewed: Viewed) -> Viewer:
    return Viewer(viewed.root, token="secret")


@pytest.fixture()
def own(viewed: Viewed, tmp_path: Path) -> Viewed:
    """Return a copy of the folder for a test that changes it; the slide is not copied."""
    root = tmp_path / "out"
    shutil.copytree(viewed.root, root)
    return replace(viewed, root=root, folder=root / "s")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a table of a few cells, to be copied."""
    folder = tmp_path_factory.mktemp("small") / "s"
    write_table(folder, ellipses(5)).close()
    return folder


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a packed body as the page does."""
    length = int.from_bytes(body[:4], "little")
    head = json.loads(body[4 : 4 + length])
    start = 4 + length
    assert start % 8 == 0
    arrays = {
        name: np.frombuffer(body, dtype, n, start + offset) for name, (dtype, n, offset) in head["arrays"].items()
    }
    return head["facts"], arrays


def got(viewer: Viewer, path: str) -> bytes:
    """Return the body of an answer that must be there."""
    answer = viewer.answer(f"/s/s/{path}")
    assert answer.status == 200, answer.body
    return answer.body


def cookie_of(server: Server) -> str:
    """Return the cookie that a browser gets which opens the link."""
    given = ask(server, f"/{server.viewer.session.fresh_token()}/", cookie="").getheader("Set-Cookie") or ""
    return given.partition(";")[0]


def ask(
    server: Server, target: str, method: str = "GET", host: str | None = None, cookie: str | None = None
) -> http.client.HTTPResponse:
    """Send one request over the wire, as it is written; with the cookie of a link unless another is given."""
    if cookie is None:
        cookie = cookie_of(server)
    line = http.client.HTTPConnection(LOOPBACK, server.server_port, timeout=10)
    line.putrequest(method, target, skip_host=True)
    line.putheader("Host", f"{LOOPBACK}:{server.server_port}" if host is None else host)
    if cookie:
        line.putheader("Cookie", cookie)
    line.endheaders()
    return line.getresponse()


def test_it_listens_on_the_loopback_only(viewer: Viewer) -> None:
    with serving(viewer) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert server.address == f"http://127.0.0.1:{server.server_port}/secret/"
        with pytest.raises(MissingDependencyError, match="--port"):
            open_server(viewer, server.server_port)
    assert not any("host" in option or "bind" in option for p in command.params for option in p.opts)


def test_other_names_find_nothing(viewer: Viewer) -> None:
    with serving(viewer) as server:
        assert ask(server, "/").status == 302
        assert ask(server, "/s/s/", host=f"localhost:{server.server_port}").status == 200
        for host in ("slides.example", f"slides.example:{server.server_port}", "127.0.0.1", "", "127.0.0.1:1"):
            assert ask(server, "/s/s/", host=host).status == 403, host
        for target in ("/nothing", "*", "/s", "/s/s//facts.json"):
            assert ask(server, target).status == 404, target


def test_a_link_works_once_and_is_exchanged_for_a_cookie(viewer: Viewer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cellslide")
    with serving(viewer) as server:
        for target in (
            "/",
            "/s/s/",
            "/s/s/facts.json",
            "/files/s/run.json",
            "/static/view.js",
            "/secre/",
            "/%73ecret/",
        ):
            answer = ask(server, target, cookie="")
            assert answer.status == 403 and b"Enter" in answer.read(), target
        assert ask(server, "/secret/", "HEAD", cookie="").status == 403
        assert ask(server, "/secret/", host="slides.example", cookie="").getheader("Set-Cookie") is None
        answer = ask(server, "/secret/s/s/", cookie="")
        assert (answer.status, answer.getheader("Location")) == (303, "/s/s/")
        given, *rest = (answer.getheader("Set-Cookie") or "").split("; ")
        assert rest == ["HttpOnly", "SameSite=Strict", "Path=/"] and "secret" not in given
        assert len(given.partition("=")[2]) > 40
        for cookie in ("", given):
            again = ask(server, "/secret/s/s/", cookie=cookie)
            assert again.status == 403 and b"Enter" in again.read() and again.getheader("Set-Cookie") is None
        assert ask(server, "/s/s/facts.json", cookie=f"other=1; {given}").status == 200
        for wrong in (given[:-1], given.replace("=", "=x"), f"cellslide={given.partition('=')[2]}", "=;;=", "\xff"):
            assert ask(server, "/s/s/facts.json", cookie=wrong).status == 403, wrong
        # Another link, for another browser.
        link = server.address
        assert link == server.address != f"http://{LOOPBACK}:{server.server_port}/secret/"
        token = link.split("/")[3]
        assert len(token) >= 20 and ask(server, f"/{token}/", cookie="").getheader("Set-Cookie") == "; ".join(
            [given, *rest]
        )
        # A path of two slashes would lead to another machine.
        token = server.viewer.session.fresh_token()
        assert ask(server, f"/{token}//slides.example/", cookie="").getheader("Location") == "/slides.example/"
        assert ask(server, "/s/s/?again").getheader("Location") == "/s/s/"
    assert "secret" not in caplog.text and token not in caplog.text
    assert Viewer(viewer.root).token != Viewer(viewer.root).token
    assert not viewer.session.knows(given, server.server_port + 1)


def test_it_takes_nothing(viewer: Viewer) -> None:
    with serving(viewer) as server:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            answer = ask(server, "/s/s/", method)
            assert (answer.status, answer.getheader("Connection")) == (405, "close")
        head = ask(server, "/s/s/facts.json", "HEAD")
        assert head.status == 200 and int(head.getheader("Content-Length", "0")) > 100 and head.read() == b""


def test_what_goes_out_may_run_nothing_foreign(viewer: Viewer) -> None:
    with serving(viewer) as server:
        cookie = cookie_of(server)
        asked = [
            ask(server, f"/{name}", cookie=cookie) for name in ("s/s/", "static/view.js", "s/s/facts.json", "none")
        ]
        asked += [ask(server, "/s/s/", cookie=""), ask(server, "/secret/", cookie=""), ask(server, "/", "POST")]
        asked += [ask(server, "/", "BREW"), ask(server, "/" + "x" * 40_000), ask(server, "/", host="slides.example")]
        for answer in asked:
            policy = answer.getheader("Content-Security-Policy") or ""
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert (
                answer.getheader("X-Frame-Options") == "DENY" and answer.getheader("Referrer-Policy") == "no-referrer"
            )
            assert answer.getheader("X-Content-Type-Options") == "nosniff"
            assert answer.getheader("Access-Control-Allow-Origin") is None


def test_an_error_inside_is_told_in_one_line(
    viewer: Viewer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(viewer, "answer", lambda target: 1 / 0)
    with serving(viewer) as server:
        answer = ask(server, "/x")
        assert answer.status == 500 and b"ZeroDivision" not in answer.read()
    assert "ZeroDivisionError" in caplog.text and "secret" not in caplog.text


@pytest.fixture()
def hostile(own: Viewed, tmp_path: Path) -> Path:
    """Return an output folder with a report, and links that lead out of it; `secret.json` lies beside it."""
    out = own.root
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "page.html").write_text("x")
    (out / "s" / "report.html").write_text("<script>1</script>")
    (out / "s" / "linked.json").symlink_to(tmp_path / "secret.json")
    (out / "s" / "inner.json").symlink_to(out / "s" / "run.json")
    (out / "away").symlink_to(tmp_path / "else")
    (out / "s" / "notes.txt").write_text("not served")
    (out / "loop.json").symlink_to(out / "loop.json")
    return out


def test_files_outside_of_the_folder_are_refused(hostile: Path) -> None:
    viewer = Viewer(hostile, token="secret")
    report = viewer.answer("/files/s/report.html")
    assert report.status == 200 and report.policy.startswith("sandbox;") and "script-src" not in report.policy
    for word in ("default-src 'none'", "connect-src 'none'", "form-action 'none'"):
        assert word in report.policy
    assert viewer.answer("/files/s/run.json").status == 200
    assert viewer.answer("/files/s/inner.json").status == 200
    outside = hostile.parent / "secret.json"
    for name in (
        "../secret.json", "s/../../secret.json", "..%2fsecret.json", "%2e%2e/secret.json", "s/..%2f../secret.json",
        str(outside), f"/{outside}", "s/linked.json", "away/page.html", "loop.json", "s/notes.txt", "s", "s/cells.zarr",
        "s//run.json", "./s/run.json", "s\\run.json", "s/run.json%00.html", "", ".", "none.json", "%ff.json",
    ):  # fmt: skip
        assert viewer.answer(f"/files/{name}").status == 404, name
    for name in ("../s", "%2e%2e%2fs", "s%2f..", "away", "", "t"):
        assert viewer.answer(f"/s/{name}/facts.json").status == 404, name
    for name in (
        "../view.js",
        "decide.py",
        "openseadragon-LICENSE.txt",
        "view.html",
        "%2e%2e/nuclei-small.safetensors",
    ):
        assert viewer.answer(f"/static/{name}").status == 404, name


def test_slides_that_links_lead_to_are_left_out(
    own: Viewed, viewed: Viewed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside, outside = own, viewed
    (inside.root / "t").symlink_to(outside.folder)
    assert list(find_slides(inside.root)) == ["s"] and "leads out of" in caplog.text
    (inside.root / "u").mkdir()
    (inside.root / "u" / "cells.zarr").symlink_to(outside.folder / "cells.zarr")
    assert list(find_slides(inside.root)) == ["s"]
    (inside.root / "only").mkdir()
    (inside.root / "only" / "cells.zarr").symlink_to(outside.folder / "cells.zarr")
    with pytest.raises(UsageError, match="no cells.zarr"):
        find_slides(inside.root / "only")
    # A part of a table that is a link, made after the folders were listed.
    viewer = Viewer(inside.root, token="secret")
    column = inside.folder / "cells.zarr" / "tables" / "cells" / "obs" / "x"
    column.rename(tmp_path / "x")
    column.symlink_to(tmp_path / "x")
    answer = viewer.answer("/s/s/facts.json")
    assert answer.status == 400 and b"leads out of" in answer.body


def test_nothing_is_written(viewed: Viewed, viewer: Viewer) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in (viewed.root, *viewed.root.rglob("*"))}

    before = state()
    for path in ("", "facts.json", f"cells?{WHOLE}", "counts.json?gate=safe", "tile/9/0/0", "cell/4", "crop/4/local"):
        got(viewer, path)
    viewer.scenes.close()
    assert state() == before


def test_cells_of_a_box_are_those_of_the_table(viewed: Viewed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and row groups small enough that a box needs many of each."""
    monkeypatch.setattr(spatial, "ROW_GROUP", 40)
    monkeypatch.setattr(view_cells, "BLOCK_ROWS", 32)
    made = write_viewed(tmp_path / "out")
    viewer = Viewer(made.root, token="secret")
    box = (200.0, 120.0, 1000.0, 760.0)
    facts, arrays = unpack(got(viewer, "cells?x0=200&y0=120&x1=1000&y1=760&scale=1"))
    inside = ((made.xy >= box[:2]) & (made.xy < box[2:])).all(axis=1)
    rows = np.flatnonzero(inside)
    assert 50 < len(rows) < 200 and facts == {"form": "outlines", "n": len(rows), "box": list(box)}
    assert arrays["row"].tolist() == rows.tolist()
    np.testing.assert_allclose(arrays["xy"].reshape(-1, 2) + box[:2], made.xy[rows])
    for name, expected in (
        ("prob_local", made.probs.local),
        ("prob_global", made.probs.global_),
        ("gate", made.probs.gate),
    ):
        np.testing.assert_array_equal(arrays[name], expected[rows].ravel(), err_msg=name)
    with open_table(made.folder / "cells.zarr") as table:
        for i in (0, len(rows) // 2, len(rows) - 1):
            ring, _ = table.rings(int(rows[i]), int(rows[i]) + 1) or (np.empty((0, 2)), None)
            mine = arrays["ring"].reshape(-1, 2)[arrays["start"][i] : arrays["start"][i + 1]]
            np.testing.assert_allclose(mine + box[:2], ring, atol=1e-3)


@pytest.mark.parametrize(
    ("query", "form"),
    [("scale=0.05", "points"), ("scale=1", "outlines"), ("scale=0.1", "points"), ("scale=0.2", "outlines")],
)  # fmt: skip
def test_small_nuclei_are_points(viewer: Viewer, query: str, form: str) -> None:
    assert unpack(got(viewer, f"cells?{WHOLE}&{query}"))[0]["form"] == form


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_every_kind_of_table_is_shown(tmp_path: Path, kind: Any) -> None:
    """Typed by the detector itself, on a slide that is gone."""
    cells = as_kind(ellipses(50), kind)
    write_table(tmp_path / "s", cells, model_spec(kind)).close()
    viewer = Viewer(tmp_path, token="secret")
    facts = json.loads(got(viewer, "facts.json"))
    assert facts["n"] == 50 and "--slide" in facts["trouble"] and not facts["rule"]["paths"] and facts["named"]
    _, arrays = unpack(got(viewer, "cells?x0=0&y0=0&x1=4000&y1=3000"))
    assert ("ring" in arrays) == (kind != "point")
    for name in ("class", "class_top"):
        np.testing.assert_array_equal(arrays[name], np.asarray(cells.class_prob).argmax(axis=1))
    assert np.asarray(Image.open(io.BytesIO(got(viewer, "tile/12/0/0")))).std() == 0
    assert json.loads(got(viewer, "cell/3"))["crops"] == []
    assert viewer.answer("/s/s/crop/3/nucleus").status == 404
    half = json.loads(got(viewer, "counts.json?abstain=0.6"))
    assert half["abstained"] == int((np.asarray(cells.class_prob).max(axis=1) < 0.6).sum()) > 0
    assert sum(half["classes"]) + half["abstained"] == 50


def test_a_table_without_cells_is_shown(tmp_path: Path) -> None:
    write_table(tmp_path / "s", ellipses(0, 0), model_spec(classes=())).close()
    viewer = Viewer(tmp_path, token="secret")
    assert unpack(got(viewer, f"cells?{WHOLE}"))[0]["n"] == 0
    assert json.loads(got(viewer, "counts.json")) == {"classes": [0], "abstained": 0, "untyped": 0}
    assert not json.loads(got(viewer, "facts.json"))["named"]


POLICIES = [
    DecisionConfig("mix", abstain=0.8),
    DecisionConfig("local", abstain=0.0),
    DecisionConfig("global", thresholds=(0.9, 0.1, 0.5), abstain=0.3),
    DecisionConfig("safe"),
    DecisionConfig("safe", tau=0.8, gamma=0.2, abstain=0.6),
]


def expected_marks(probs: PathProbs, decision: DecisionConfig) -> np.ndarray:
    """Return what `decision.decide` makes of cells: the class, 3 where it abstains, 4 where it is not typed."""
    known = np.flatnonzero(~np.isnan(probs.local).any(axis=1))
    part = PathProbs(probs.local[known], probs.global_[known], probs.gate[known])
    made = decide(part, decision, CALIBRATION)
    marks = np.full(len(probs), 4)
    marks[known] = np.where(made.abstained, 3, made.class_index)
    return marks


@pytest.mark.parametrize("decision", POLICIES, ids=lambda d: f"{d.gate}-{d.tau}-{d.abstain}")
def test_a_slide_is_decided_anew_as_the_gate_does(
    viewed: Viewed, decision: DecisionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_policy, "BLOCK_ROWS", 64)
    with open_table(viewed.folder / "cells.zarr") as table:
        decisions = Decisions(table, StoredRule.of(table))
        # A policy says its floors itself, so the calibration's are written out.
        given = decision.abstain is not None or decision.thresholds is not None
        full = decision if given else replace(decision, thresholds=CALIBRATION.thresholds, abstain=CALIBRATION.abstain)
        marks = decisions.marks(DecisionRule(full))
        np.testing.assert_array_equal(marks, expected_marks(viewed.probs, decision))
        some = np.array([3, 40, 170])
        np.testing.assert_array_equal(decisions.marks(DecisionRule(full), some), marks[some])


def test_the_stored_rule_gives_the_stored_classes(viewed: Viewed, viewer: Viewer) -> None:
    with open_table(viewed.folder / "cells.zarr") as table:
        stored: Any = table.column("class")
        abstained = table.vector("abstained").astype(bool)
    counts = json.loads(got(viewer, "counts.json"))
    kept = stored.codes[(stored.codes >= 0) & (stored.codes < 3)]
    np.testing.assert_array_equal(stored.codes == 3, abstained)
    assert counts["classes"] == np.bincount(kept, minlength=3).tolist()
    assert (counts["abstained"], counts["untyped"]) == (int(abstained.sum()), int((stored.codes < 0).sum()))
    by_score = json.loads(got(viewer, "counts.json?score=0.75"))
    assert sum(by_score["classes"]) + by_score["abstained"] + by_score["untyped"] == 150


@pytest.mark.parametrize(
    "query", ["gate=other", "tau=2", "abstain=x", "score=-1", "gamma=nan"]
)  # fmt: skip
def test_wrong_questions_are_refused_in_words(viewer: Viewer, query: str) -> None:
    answer = viewer.answer(f"/s/s/counts.json?{query}")
    assert answer.status == 400 and query.partition("=")[0].encode() in answer.body


@pytest.mark.parametrize(
    "query", ["", "x0=1&y0=1&x1=1&y1=2", "x0=a&y0=0&x1=1&y1=1", "x0=0&y0=0&x1=nan&y1=1", f"{WHOLE}&scale=0"]
)
def test_a_box_must_be_one(viewer: Viewer, query: str) -> None:
    assert viewer.answer(f"/s/s/cells?{query}").status == 400


def test_no_safe_gate_without_reliability(viewed: Viewed) -> None:
    stored = StoredRule(DecisionConfig(), replace(CALIBRATION, reliability_local=None), True)
    assert not stored.can_be_safe
    with pytest.raises(UsageError, match="reliability"):
        DecisionRule.asked({"gate": "safe"}, stored)


def test_a_crowd_comes_as_counts(viewed: Viewed, viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_cells, "MOST_POINTS", 100)
    facts, arrays = unpack(got(viewer, f"cells?{WHOLE}&scale=0.1&gate=local&abstain=0.7&floors=0&score=0.6"))
    assert facts["form"] == "density" and facts["bin"] == 100
    counts = arrays["counts"].reshape(5, facts["rows"], facts["cols"])
    shown = np.linspace(0.5, 1, 300).astype(np.float32) >= np.float32(0.6)
    marks = expected_marks(viewed.probs, DecisionConfig("local", abstain=0.7))
    expected = np.zeros_like(counts)
    for (x, y), mark in zip(viewed.xy[shown], marks[shown], strict=True):
        expected[mark, int(y // 100), int(x // 100)] += 1
    np.testing.assert_array_equal(counts, expected)


def test_a_grid_keeps_every_point() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.uniform(10, 90, 500).astype(np.float32) for _ in range(2))
    counts, rows, cols = density(x, y, np.zeros(500, int), 1, (10, 10, 90, 90), 7.0)
    assert counts.sum() == 500 and counts.shape == (1, rows, cols) == (1, 12, 12)


def test_what_is_beyond_the_room_is_dropped() -> None:
    cache, made = LruCache(3_000, len), []
    for key in (0, 1, 0, 2, 3, 0, 1):
        value = cache.get(key, lambda key=key: (made.append(key), bytes([key]) * 1_000)[1])
        assert value[0] == key
    assert made == [0, 1, 2, 3, 1] and cache.size == 3_000
    assert len(cache.get("large", lambda: bytes(9_000))) == 9_000 and cache.size == 9_000


def test_packing_aligns_and_keeps_values() -> None:
    arrays = {
        "a": np.arange(3, dtype=np.int16),
        "b": np.array([[1.5, np.nan]], np.float32),
        "c": np.empty(0, np.uint32),
    }
    facts, out = unpack(pack(arrays, {"é": 1}))
    assert facts == {"é": 1}
    for name, array in arrays.items():
        np.testing.assert_array_equal(out[name], array.ravel())


def test_tiles_are_the_slide(viewed: Viewed, viewer: Viewer) -> None:
    facts = json.loads(got(viewer, "facts.json"))
    with open_slide(viewed.slide) as slide:
        for level, factor in ((facts["top"], 1), (facts["top"] - 2, 4)):
            width, height = -(-WIDTH // factor), -(-HEIGHT // factor)
            mosaic = np.zeros((height, width, 3), np.uint8)
            for y in range(0, height, 512):
                for x in range(0, width, 512):
                    body = got(viewer, f"tile/{level}/{x // 512}/{y // 512}")
                    part = np.asarray(Image.open(io.BytesIO(body)))
                    mosaic[y : y + part.shape[0], x : x + part.shape[1]] = part
            real = slide.thumbnail(max(width, height))
            assert mosaic.shape == real.shape
            assert np.abs(mosaic.astype(int) - real).mean() < 3
    assert viewer.answer(f"/s/s/tile/{facts['top']}/4/0").status == 404
    for place in ("99/0/0", "11/-1/0", "11/x/0", "11/0", "11/99999999999999/0", "11/²/0"):
        assert viewer.answer(f"/s/s/tile/{place}").status == 404, place


def test_a_cell_tells_both_paths_and_shows_itself(viewed: Viewed, viewer: Viewer) -> None:
    cell = json.loads(got(viewer, "cell/21"))
    assert cell["obs"]["cell_id"] == 21 and cell["obs"]["class_top"] in [c.name for c in CLASSES]
    assert cell["obs"]["class"] in (cell["obs"]["class_top"], "abstained")
    np.testing.assert_allclose(cell["probs"]["prob_local"], viewed.probs.local[21])
    np.testing.assert_allclose(cell["probs"]["prob_global"], viewed.probs.global_[21])
    assert cell["features"]["perimeter_um"] > 0
    fields = {crop["name"]: crop for crop in cell["crops"]}
    assert {name: crop["um"] for name, crop in fields.items()} == {"local": 32.0, "context": 128.0}
    for name, crop in fields.items():
        picture = np.asarray(Image.open(io.BytesIO(got(viewer, f"crop/21/{name}")))).astype(int)
        outline = np.array(crop["outline"])
        np.testing.assert_allclose(outline.mean(axis=0), 0.5, atol=0.02)
        assert np.ptp(outline[:, 0]) == pytest.approx(2 * RADIUS * 0.25 / crop["um"], rel=0.02)
        middle, corner = picture[len(picture) // 2, len(picture) // 2], picture[0, len(picture) // 2]
        assert middle[1] < 100, "the disc stands in the middle"
        assert corner[1] > 200 or name == "context"
    skipped = json.loads(got(viewer, "cell/3"))
    assert skipped["probs"]["prob_global"] == [None] * 3 and skipped["obs"]["gate"] is None
    untyped = json.loads(got(viewer, "cell/7"))
    assert untyped["obs"]["class"] is None
    for row in ("300", "-1", "x", "1.5"):
        assert viewer.answer(f"/s/s/cell/{row}").status == 404


def test_odd_nuclei_and_ids_are_found_with_their_places(viewed: Viewed, viewer: Viewer) -> None:
    with open_table(viewed.folder / "cells.zarr") as table:
        prob, uuid = table.vector("class_prob"), str(table.vector("uuid")[42])
    unsure = json.loads(got(viewer, "ranked.json?by=uncertain"))["cells"]
    typed = np.isfinite(prob)
    assert len(unsure) == 200 and [row for row, _, _ in unsure[:3]] == np.argsort(np.where(typed, prob, 2))[:3].tolist()
    np.testing.assert_allclose([place for _, *place in unsure], viewed.xy[[row for row, _, _ in unsure]])
    disputed = [row for row, _, _ in json.loads(got(viewer, "ranked.json?by=disputed"))["cells"]]
    local, global_ = viewed.probs.local[disputed], viewed.probs.global_[disputed]
    assert disputed and (local.argmax(axis=1) != global_.argmax(axis=1)).all()
    largest = json.loads(got(viewer, "ranked.json?by=largest"))["cells"]
    assert [row for row, _, _ in largest[:3]] == [0, 1, 2], "all are as large"
    for word in ("42", uuid, uuid.upper()):
        assert json.loads(got(viewer, f"find.json?id={word}"))["cells"] == [[42, *viewed.xy[42].tolist()]]
    for question in ("ranked.json?by=odd", "ranked.json", "find.json?id=300", "find.json?id=x", "find.json"):
        assert viewer.answer(f"/s/s/{question}").status == 400


def test_regions_come_in_level_0_pixels(viewed: Viewed, tmp_path: Path) -> None:
    shutil.copytree(viewed.root, tmp_path / "out")
    square = [[10, 10], [500, 10], [500, 400], [10, 400], [10, 10]]

    def feature(name: str) -> dict[str, object]:
        properties = {"classification": {"name": name}, "measurements": {"area mm2": 0.01}}
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square]}, "properties": properties}

    collection = {"type": "FeatureCollection", "features": [feature("Tissue"), feature("Artefact: ink")]}
    (tmp_path / "out" / "s" / "tissue.geojson").write_text(json.dumps(collection))
    found = json.loads(got(Viewer(tmp_path / "out", viewed.slide), "regions.json"))
    assert found["tissue"] == [[square]] and [a["rings"] for a in found["artefacts"]] == [[square]]
    assert "ink" in found["artefacts"][0]["name"]
    assert json.loads(got(Viewer(viewed.root), "regions.json")) == {"tissue": [], "artefacts": []}


def test_a_table_written_anew_is_opened_anew(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "s")
    viewer = Viewer(tmp_path, token="secret")
    assert json.loads(got(viewer, "facts.json"))["n"] == 5
    write_table(tmp_path / "s", ellipses(60)).close()
    assert json.loads(got(viewer, "facts.json"))["n"] == 60
    (tmp_path / "s" / "cells.zarr").rename(tmp_path / "s" / "gone")
    answer = viewer.answer("/s/s/facts.json")
    assert answer.status == 400 and b"is gone" in answer.body


def test_few_slides_are_open_at_once_and_none_in_use_is_closed(small: Path, tmp_path: Path) -> None:
    for k in range(4):
        shutil.copytree(small, tmp_path / f"s{k}")
    scenes = Viewer(tmp_path).scenes
    scenes.most = 2
    with scenes.use("s0") as first:
        for k in range(1, 4):
            with scenes.use(f"s{k}"):
                pass
        assert len(scenes._open) == 2
        # Its file of outlines is still open.
        assert first.index.rings(np.array([0])) is not None
    with scenes.use("s0") as again:
        assert again is not first


def test_a_slide_that_opens_slowly_is_waited_for_by_those_who_want_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow", "quick"):
        shutil.copytree(small, tmp_path / name)
    scenes, begun, go, opened = Viewer(tmp_path).scenes, Event(), Event(), []

    def opens(root: Path, folder: Path, moved_to: Path | None) -> SimpleNamespace:
        opened.append(folder.name)
        if folder.name == "slow":
            begun.set()
            assert go.wait(20)
        return SimpleNamespace(name=folder.name, close=lambda: None)

    def look(name: str) -> str:
        with scenes.use(name) as scene:
            return scene.name

    monkeypatch.setattr(scene_module, "ViewedSlide", opens)
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(look, "slow") for _ in range(2)]
        try:
            assert begun.wait(20)
            assert pool.submit(look, "quick").result(20) == "quick"
            assert not any(future.done() for future in slow)
        finally:
            go.set()
        assert [future.result(20) for future in slow] == ["slow", "slow"]
    assert opened == ["slow", "quick"] and not any(entry.users for entry in scenes._open.values())


def test_a_slide_that_moved_or_changed(small: Path, tmp_path: Path) -> None:
    made = write_viewed(tmp_path / "out")
    moved = tmp_path / "moved.tif"
    made.slide.rename(moved)
    assert "--slide" in json.loads(got(Viewer(made.root, token="secret"), "facts.json"))["trouble"]
    assert json.loads(got(Viewer(made.root, moved, "secret"), "facts.json"))["trouble"] == ""
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    data[200] ^= 1
    moved.write_bytes(data)
    assert "not the slide" in json.loads(got(Viewer(made.root, moved, "secret"), "facts.json"))["trouble"]
    shutil.copytree(small, made.root / "t")
    with pytest.raises(UsageError, match="2 slides"):
        Viewer(made.root, moved)


def test_several_slides_are_listed(small: Path, tmp_path: Path) -> None:
    names = ["a b", "c&d<script>", "é#?"]
    for name in names:
        shutil.copytree(small, tmp_path / name)
    (tmp_path / "cohort.html").write_text("x")
    viewer = Viewer(tmp_path, token="secret")
    page = viewer.answer("/").body.decode()
    links = re.findall(r'<li><a href="([^"]+)"', page)
    assert links == ["files/cohort.html", "s/a%20b/", "s/c%26d%3Cscript%3E/", "s/%C3%A9%23%3F/"]
    assert "<script" not in page
    assert all(viewer.answer(f"/{link}").status == 200 for link in links)
    assert viewer.answer("/files/a%20b/").to == "/s/a%20b/"
    assert Viewer(tmp_path / "a b", token="secret").answer("/").to == "/s/a%20b/"


def test_folder_without_slides_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert isinstance(result.exception, UsageError) and "no cells.zarr" in str(result.exception)


def test_the_command_says_where_and_ends_cleanly(viewed: Viewed) -> None:
    line = [sys.executable, "-m", "cellslide", "view", str(viewed.root)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/[\w-]{20,}/ ", said)
        assert found, said
        assert "Enter" in said
        with socket.create_connection((LOOPBACK, int(found[1])), timeout=10):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 143


def test_every_packaged_file_is_there_with_its_licence() -> None:
    folder = CHECKOUT / "cellslide" / "data" / "view"
    from cellslide.view.answers import STATIC

    assert {p.name for p in folder.iterdir()} == {*STATIC, "view.html", "openseadragon-LICENSE.txt"}
    assert "Redistribution and use in source and binary forms" in (folder / "openseadragon-LICENSE.txt").read_text()
    for path in folder.glob("*.js"):
        if "openseadragon" not in path.name:
            assert not re.search(r"https?://(?!www\.w3\.org/)", path.read_text()), f"{path.name} names another machine"


def test_index_reads_scores_that_are_missing(tmp_path: Path) -> None:
    cells = ellipses(4)
    score = np.array([0.2, np.nan, 0.9, 0.5], np.float32)
    with write_table(tmp_path / "s", replace(cells, score=score)) as table:
        index = CellIndex(table)
        assert index.rows_in((0, 0, 4000, 3000), 0.5).tolist() == [1, 2, 3]


def test_a_head_must_come_in_time_and_be_of_a_browsers_size(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_server, "HEAD_S", 1.0)
    with serving(viewer) as server:
        place = (LOOPBACK, server.server_port)
        with socket.create_connection(place, timeout=10) as slow:
            began = time.monotonic()
            ended = False
            while not ended and time.monotonic() - began < 8:
                # A byte at a time, each soon after the last.
                try:
                    slow.sendall(b"x")
                    slow.settimeout(0.1)
                    ended = slow.recv(1) == b""
                except TimeoutError:
                    pass
                except OSError:
                    ended = True
            assert ended and time.monotonic() - began < 4
        for head in (b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9_000):
            with socket.create_connection(place, timeout=10) as large:
                large.sendall(head)
                assert b" 431 " in large.recv(100)
        # A connection that is kept open is given the same time for its next request.
        line = http.client.HTTPConnection(*place, timeout=10)
        for _ in range(3):
            line.request("GET", "/favicon.ico")
            assert line.getresponse().read() == b""
            time.sleep(0.6)


def test_so_many_connections_and_no_more(viewer: Viewer) -> None:
    with serving(viewer) as server:
        place = (LOOPBACK, server.server_port)
        held = [socket.create_connection(place, timeout=10) for _ in range(MOST_CONNECTIONS)]
        try:
            with socket.create_connection(place, timeout=10) as more:
                assert more.recv(1) == b""
            held.pop().close()
            end = time.monotonic() + 10
            while True:
                try:
                    assert ask(server, "/favicon.ico", cookie="").status == 204
                    break
                except (http.client.HTTPException, ConnectionError):
                    assert time.monotonic() < end
                    time.sleep(0.05)
        finally:
            for line in held:
                line.close()


def test_a_large_file_is_sent_in_parts_and_one_that_is_gone_is_missing(
    own: Viewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(3_000_001)
    (own.folder / "large.json").write_bytes(content)
    with serving(Viewer(own.root)) as server:
        asked = ask(server, "/files/s/large.json")
        assert asked.status == 200 and asked.read() == content
        monkeypatch.setattr(server.viewer, "answer", lambda target: Answer(file=own.folder / "gone.json"))
        assert ask(server, "/files/s/gone.json").status == 404


def test_few_answers_are_made_at_once(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most = [0], [0]

    def slow(scene: Any, what: Any, query: Any) -> Answer:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        at_work[0] -= 1
        return Answer()

    monkeypatch.setattr(answers, "_of_scene", slow)
    with ThreadPoolExecutor(24) as pool:
        assert all(a.status == 200 for a in pool.map(viewer.answer, ["/s/s/facts.json"] * 24))
    assert 1 < most[0] <= answers.MOST_AT_WORK


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_enter_prints_another_link(viewed: Viewed) -> None:
    ours, theirs = os.openpty()
    line = [sys.executable, "-m", "cellslide", "view", str(viewed.root)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        line, cwd=CHECKOUT, env=environment, stdin=theirs, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        link = process.stdout.readline().split()[0]
        port = int(link.split(":")[2].partition("/")[0])
        os.write(ours, b"\n")
        assert process.stdout.readline().strip() == link
        with socket.create_connection((LOOPBACK, port), timeout=10) as browser:
            browser.sendall(f"GET /{link.split('/')[3]}/ HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n\r\n".encode())
            assert b" 303 " in browser.recv(100)
        os.write(ours, b"\n")
        other = process.stdout.readline().strip()
        assert other != link and other.startswith(f"http://{LOOPBACK}:{port}/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    os.close(ours)
    os.close(theirs)
