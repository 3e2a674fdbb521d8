"""Local copies: all files of a slide, removed whatever happens, and never in the way of a slide that does not fit."""

from __future__ import annotations

import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellslide.batch.local_copy import PREFIX, LocalCopies, pieces_of, remove_left
from cellslide.batch.work import SegmentWork, SlideWork, do_slide
from cellslide.classify.targets import Target
from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import Interrupted
from cellslide.inference.segmenter import open_segmenter
from cellslide.progress import Silent, Watch
from cellslide.slides import reopen
from cellslide.slides.inputs import SlideInput
from cellslide.store.run_record import read_record
from tests.painted import paint_slide
from tests.support.fakes import fake_model

Usage = namedtuple("Usage", "total used free")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def places(path: Path) -> set[str]:
    return {piece.place.as_posix() for piece in pieces_of(path)}


def test_all_files_of_a_slide_are_its_pieces(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs", "m.mrxs", "m/Slidedat.ini", "m/Data0001.dat", "d/1.dcm", "d/sub/2.dcm", "o.jpg")
    touch(tmp_path, "p.jpg", "q.jpg", "inner/p.jpg")
    assert places(tmp_path / "a.svs") == {"a.svs"}
    assert places(tmp_path / "m.mrxs") == {"m.mrxs", "m/Slidedat.ini", "m/Data0001.dat"}
    assert places(tmp_path / "d") == {"d/1.dcm", "d/sub/2.dcm"}
    index = "[Virtual Microscope Specimen]\nImageFile=p.jpg\nImageFile(1,0)=q.jpg\nMapFile=gone.jpg\nOther=../o.jpg\n"
    (tmp_path / "h.vms").write_text(index)
    assert places(tmp_path / "h.vms") == {"h.vms", "p.jpg", "q.jpg"}


def test_files_of_one_dicom_series_and_of_one_ome_set_go_together(tmp_path: Path) -> None:
    for name, uid in (("1", b"1.2"), ("2", b"1.2"), ("3", b"9.9")):
        (tmp_path / f"{name}.dcm").write_bytes(b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid)
    assert places(tmp_path / "1.dcm") == {"1.dcm", "2.dcm"}
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="8" SizeC="1" SizeZ="1" SizeT="1">'
        '<TiffData><UUID FileName="other.ome.tif">urn:uuid:1</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "one.ome.tif", np.zeros((8, 8), np.uint8), description=xml, metadata=None)
    touch(tmp_path, "other.ome.tif")
    assert places(tmp_path / "one.ome.tif") == {"one.ome.tif", "other.ome.tif"}


def test_a_copy_is_there_while_it_is_used_and_gone_after(tmp_path: Path) -> None:
    touch(tmp_path, "m.mrxs", "m/Data0001.dat")
    copies, source = LocalCopies(tmp_path / "stage", 0), SlideInput(tmp_path / "m.mrxs", 0.5, "lung", "m")
    with copies.of(source) as local:
        assert local.local is not None and local.local.read_bytes() == b"m.mrxs"
        assert (local.local.with_suffix("") / "Data0001.dat").read_bytes() == b"m/Data0001.dat"
        assert (local.path, local.mpp, local.organ, local.slide_id) == (source.path, 0.5, "lung", "m")
    assert not any((tmp_path / "stage").iterdir())
    with pytest.raises(ZeroDivisionError), copies.of(source):
        _ = 1 / 0
    assert not any((tmp_path / "stage").iterdir())
    assert source.path.exists()


def test_what_does_not_fit_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.svs")
    source, stage = SlideInput(tmp_path / "a.svs"), tmp_path / "stage"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    with LocalCopies(stage, 5).of(source) as local:
        assert local.local is not None, "5 bytes and 5 kept free fit into 10"
    with LocalCopies(stage, 6).of(source) as local:
        assert local.local is None and not any(stage.iterdir())
    assert "do not fit" in caplog.text


def test_a_disk_that_fills_up_or_a_source_that_is_gone_costs_no_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "m.mrxs", "m/Data0001.dat")
    copies, source = LocalCopies(tmp_path / "stage", 0), SlideInput(tmp_path / "m.mrxs")

    def full(piece: object, place: Path, watch: object) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cellslide.batch.local_copy._copy", full)
        with copies.of(source) as local:
            assert local.local is None and not any((tmp_path / "stage").iterdir())
    assert "No space left" in caplog.text
    with copies.of(SlideInput(tmp_path / "gone.svs")) as local:
        assert local.local is None


def test_a_request_to_stop_is_heard_while_copying(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    with (
        pytest.raises(Interrupted),
        LocalCopies(tmp_path / "stage", 0).of(SlideInput(tmp_path / "a.svs"), Watch(Silent(), lambda: 143)),
    ):
        pass
    assert not any((tmp_path / "stage").iterdir())


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    host = socket.gethostname()
    names = [f"{PREFIX}{host}-{os.getpid()}-x", f"{PREFIX}{host}-77-x", f"{PREFIX}elsewhere-77-x", "mine-77"]
    touch(tmp_path, *(f"{name}/f" for name in names))
    remove_left(tmp_path, lambda pid: pid == os.getpid())
    assert {p.name for p in tmp_path.iterdir()} == {names[0], names[2], names[3]}


def test_copies_change_no_result_and_done_slides_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint_slide(tmp_path / "s.tif", 300, 200, 0.5, [(100, 100)], 7.0)
    source, copied = SlideInput(tmp_path / "s.tif", slide_id="s"), []
    real = shutil.rmtree
    monkeypatch.setattr("cellslide.batch.local_copy.shutil.rmtree", lambda p, **k: (copied.append(p), real(p, **k)))
    read_from, opened = [], reopen.open_reader
    monkeypatch.setattr(reopen, "open_reader", lambda path: (read_from.append(path), opened(path))[1])
    config = SegmentConfig(
        tissue=TissueConfig(enabled=False), infer=InferConfig(device="cpu", workers=0),
        output=OutputConfig(formats=("csv",)),
    )  # fmt: skip
    with open_segmenter(fake_model(), config) as segmenter:
        for out, copies in (("plain", None), ("staged", LocalCopies(tmp_path / "stage", 0))):
            for status in ("done", "skipped"):
                work = SlideWork(SegmentWork(config), copies=copies)
                with work.local(Target(source, tmp_path / out / "s"), Watch()) as target:
                    outcome = do_slide(target, segmenter, None)
                assert (outcome.status, outcome.cells) == (status, 1)
        # The page of the run with a copy is made from the copy, while it is there.
        plain, staged = read_from
        assert plain == source.path and staged.parent.name.startswith(PREFIX)
    stages = [p for p in copied if Path(p).name.startswith(PREFIX)]
    assert len(stages) == 1 and not any((tmp_path / "stage").iterdir())
    first, second = (tmp_path / out / "s" for out in ("plain", "staged"))
    assert (first / "cells.csv.gz").read_bytes() == (second / "cells.csv.gz").read_bytes()
    records = [read_record(folder) for folder in (first, second)]
    assert records[0] and records[1] and records[0].slide == records[1].slide
