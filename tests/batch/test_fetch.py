"""Slides at web addresses: fetched once, on from where it broke, checked, removed after; no secret is written."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from cellslide.batch import fetch
from cellslide.batch.local_copy import OLDEST_PART_S, PREFIX, LocalCopies, remove_left
from cellslide.batch.work import SegmentWork, SlideWork
from cellslide.classify.targets import Target
from cellslide.cli.main import cli
from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import Interrupted, MissingDependencyError, SlideError, UsageError
from cellslide.progress import IDLE, Silent, Watch
from cellslide.slides.inputs import SlideInput, expand_slides
from cellslide.store.run_record import read_record
from tests.painted import paint_slide
from tests.support.fakes import fake_model
from tests.support.web import Site, serving

pytest.importorskip("aiohttp")
BYTES = bytes(range(256)) * 40


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "PIECE_BYTES", 4096)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    with serving(Site({"/a/slide.svs": BYTES})) as found:
        yield found


def at(site: Site, place: str = "/a/slide.svs", sha256: str | None = None) -> SlideInput:
    (source,) = expand_slides([site.address + place])
    assert source.remote is not None
    object.__setattr__(source.remote, "sha256", sha256)
    return source


def fetched(site: Site, stage: Path, source: SlideInput | None = None, watch: Watch = IDLE) -> bytes:
    with LocalCopies(stage, 0).of(source or at(site), watch) as local:
        assert local.local is not None and local.local.name == "slide.svs"
        return local.local.read_bytes()


def test_a_slide_comes_in_pieces_and_is_removed(site: Site, tmp_path: Path) -> None:
    assert fetched(site, tmp_path) == BYTES
    assert site.sent_from() == [0, 4096, 8192] and not any(tmp_path.iterdir())


def test_what_broke_off_goes_on_from_there(site: Site, tmp_path: Path) -> None:
    site.breaks = [4096, 100, 4096, 7]
    assert fetched(site, tmp_path) == BYTES
    assert site.sent_from() == [0, 4096, 4096, 8192, 8192]


def test_a_later_run_goes_on_and_a_changed_file_begins_anew(site: Site, tmp_path: Path) -> None:
    site.breaks = [4096, *[0] * fetch.ATTEMPTS]
    with pytest.raises(SlideError, match=r"/a/slide\.svs: cannot be fetched .* tried 5 times"):
        fetched(site, tmp_path)
    (part,) = tmp_path.iterdir()
    assert part.read_bytes() == BYTES[:4096]
    site.asked.clear()
    assert fetched(site, tmp_path) == BYTES and site.sent_from() == [4096, 8192]
    part.write_bytes(BYTES[:4096])
    site.files["/a/slide.svs"] = BYTES[::-1]
    assert fetched(site, tmp_path) == BYTES[::-1]


def test_a_stopped_or_killed_run_keeps_what_came(site: Site, tmp_path: Path) -> None:
    checks = iter([None] * 2)
    with pytest.raises(Interrupted):
        fetched(site, tmp_path, watch=Watch(Silent(), lambda: next(checks, 143)))
    (part,) = tmp_path.iterdir()
    assert 0 < part.stat().st_size < len(BYTES)
    killed = tmp_path / f"{PREFIX}{os.uname().nodename}-77-x"
    killed.mkdir()
    part.rename(killed / part.name)
    remove_left(tmp_path, lambda _: False)
    assert list(tmp_path.iterdir()) == [part]
    os.utime(part, (0, part.stat().st_mtime - OLDEST_PART_S - 60))
    remove_left(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_server_that_gives_no_parts(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.breaks = [5000]
    assert fetched(site, tmp_path) == BYTES
    assert set(site.sent_from()[-1:]) == {0}


def test_a_wrong_size_and_a_wrong_hash_are_named(site: Site, tmp_path: Path) -> None:
    site.claimed = len(BYTES) + 10
    with pytest.raises(SlideError, match=r"slide\.svs: cannot be fetched"):
        fetched(site, tmp_path)
    site.claimed = None
    right, wrong = hashlib.sha256(BYTES).hexdigest(), "0" * 64
    assert fetched(site, tmp_path, at(site, sha256=right)) == BYTES
    with pytest.raises(SlideError, match=f"sha256 {right}, the list says {wrong}"):
        fetched(site, tmp_path, at(site, sha256=wrong))
    site.headers = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    with pytest.raises(SlideError, match="md5"):
        fetched(site, tmp_path)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (404, UsageError, "not there"),
        (403, UsageError, "signed"),
        (503, SlideError, "HTTP 503"),
        (405, UsageError, "405"),
    ],
)
def test_what_a_server_refuses(site: Site, tmp_path: Path, status: int, kind: type, words: str) -> None:
    site.status = status
    with pytest.raises(kind, match=words) as told:
        fetched(site, tmp_path, at(site, "/a/slide.svs?X-Amz-Signature=s3cr3t-w0rd"))
    assert "s3cr3t-w0rd" not in str(told.value) and told.value.__suppress_context__
    assert len(site.asked) == (2 * fetch.ATTEMPTS if status == 503 else 2)


def test_a_page_is_no_slide_and_what_does_not_fit_is_not_fetched(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="larger --stage-dir"), LocalCopies(tmp_path, 1 << 60).of(at(site)):
        pass
    assert not site.sent_from()
    site.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(UsageError, match="web page"):
        fetched(site, tmp_path)


def test_addresses_among_files_and_in_lists(tmp_path: Path) -> None:
    table = (
        "path,organ,sha256\nhttps://me:pw@host.org/x/one%20a.svs?sig=1,lung," + "AB" * 32 + "\ns3://b/k/two.ndpi,,\n"
    )
    (tmp_path / "list.csv").write_text(table)
    one, two = expand_slides([str(tmp_path / "list.csv")])
    assert (str(one.path), one.slide_id, one.organ) == ("https://host.org/x/one%20a.svs", "one a", "lung")
    assert one.remote and one.remote.sha256 == "ab" * 32 and "pw" not in repr(one)
    assert (str(two.path), two.slide_id) == ("s3://b/k/two.ndpi", "two")
    ids = [item.slide_id for item in expand_slides(["https://h/d/s.svs?id=1&sig=9", "https://h/d/s.svs?id=2"])]
    again = [item.slide_id for item in expand_slides(["https://h/d/s.svs?id=1&sig=8", "https://h/d/s.svs?id=2"])]
    assert ids == again and len(set(ids)) == 2 and all(name.startswith("s-") for name in ids)
    assert len(expand_slides(["https://h/s.svs?token=1", "https://h/s.svs?token=2"])) == 1
    (tmp_path / "list.csv").write_text("path,sha256\nhttps://h/a.svs,12\n")
    with pytest.raises(UsageError, match="line 2: sha256 '12'"):
        expand_slides([str(tmp_path / "list.csv")])


@pytest.mark.parametrize("text", ["ftp://host/a.svs", "https://host", "https://host/a.zarr", "s3://bucket/a.mrxs"])
def test_addresses_that_are_not_fetched(text: str) -> None:
    with pytest.raises(UsageError, match=text):
        expand_slides([text])
    told = CliRunner().invoke(cli, ["info", "https://me:pw@host/a.svs"])
    assert told.exit_code == 2 and "https://host/a.svs: only run, segment and classify" in told.output


def test_s3(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "endpoint_url": site.address})
    site.breaks = [4096, 50]
    assert fetched(site, tmp_path, expand_slides(["s3://a/slide.svs"])[0]) == BYTES
    with pytest.raises(UsageError, match="s3://a/gone.svs: not there"):
        fetched(site, tmp_path, expand_slides(["s3://a/gone.svs"])[0])


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cellslide\[remote\]'"):
        fetch.Fetch(expand_slides(["https://host/a.svs"])[0])
    answer = CliRunner().invoke(cli, ["segment", "https://host/a.svs", "-o", str(tmp_path / "out")])
    assert answer.exit_code == 3


def test_a_whole_run_by_address(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paint_slide(tmp_path / "s.tif", 300, 200, 0.5, [(100, 100)], 7.0)
    site.files["/s.tif"], address = (tmp_path / "s.tif").read_bytes(), site.address + "/s.tif?sig=s3cr3t-w0rd"
    config = SegmentConfig(
        tissue=TissueConfig(enabled=False), infer=InferConfig(device="cpu", workers=0),
        output=OutputConfig(formats=("csv",)),
    )  # fmt: skip

    def done(config: SegmentConfig, source: SlideInput) -> tuple[str, int | None, str | None]:
        work = SlideWork(SegmentWork(config, lambda *_, **__: fake_model()))
        target = Target(source, tmp_path / "out" / "s")
        with work.open("cpu", 1) as one:
            outcome = one(target, Silent(), lambda: None)
        return outcome.status, outcome.cells, outcome.error

    (remote,), (plain,) = expand_slides([address]), expand_slides([tmp_path / "s.tif"])
    with caplog.at_level(logging.DEBUG, logger="cellslide"):
        assert done(config, remote) == ("done", 1, None)
        record = read_record(tmp_path / "out" / "s")
        assert record is not None and record.slide["path"] == f"{site.address}/s.tif"
        site.asked.clear()
        assert done(config, remote)[:2] == ("skipped", 1) and not site.asked, "a finished slide is not fetched again"
        assert done(replace(config, mpp=0.4), remote)[0] == "stale" and not site.asked
        site.status = 404
        assert done(replace(config, output=OutputConfig(overwrite=True)), remote)[0] == "failed"
    assert not (tmp_path / "out" / ".stage").exists()
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert (
        len(files) > 5 and not any(b"s3cr3t-w0rd" in p.read_bytes() for p in files) and "s3cr3t-w0rd" not in caplog.text
    )
    assert done(config, plain)[0] == "skipped", "the same bytes are the same slide"
