"""The slide of a table opened again: that one or none, where it was or where it is said to be now."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cellslide.errors import SlideError, UsageError
from cellslide.slides.identity import describe_slide
from cellslide.slides.reopen import reopen, reopen_or_why
from cellslide.slides.slide import open_slide
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.table_writer import CellTableWriter
from tests.painted import paint_slide
from tests.support.random_cells import ellipses, model_spec, run_record


@pytest.fixture
def table(tmp_path: Path) -> Iterator[CellTable]:
    """A table of a slide whose pixel size was given."""
    paint_slide(tmp_path / "s.tif", 200, 160, 0.5, [(100, 100)], 7.0, (1,))
    with open_slide(tmp_path / "s.tif", 0.3, "flag") as slide:
        info = slide.info
    writer = CellTableWriter(tmp_path / "out" / "cells.zarr", info, model_spec())
    writer.append(ellipses(3))
    writer.close(replace(run_record(), slide=describe_slide(info)))
    with open_table(tmp_path / "out" / "cells.zarr") as opened:
        yield opened


def test_the_pixel_size_is_the_one_that_was_used(table: CellTable, tmp_path: Path) -> None:
    with reopen(table) as slide:
        assert (slide.info.mpp_x, slide.info.path) == (0.3, tmp_path / "s.tif")
    shutil.copy(tmp_path / "s.tif", tmp_path / "copy.tif")
    with reopen(table, tmp_path / "copy.tif") as slide:
        assert (slide.info.mpp_x, slide.info.path) == (0.3, tmp_path / "copy.tif")


def test_a_slide_that_is_gone_or_another_is_said(table: CellTable, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.tif"
    (tmp_path / "s.tif").rename(elsewhere)
    with pytest.raises(UsageError, match=r"not there any more; say where it is with --slide"):
        reopen(table)
    slide, why = reopen_or_why(table)
    assert slide is None and "not there any more" in str(why)
    with pytest.raises(UsageError, match=r"--slide .*nowhere.tif: no such file"):
        reopen(table, tmp_path / "nowhere.tif")
    paint_slide(tmp_path / "s.tif", 200, 160, 0.5, [(9, 9)], 5.0)
    slide, why = reopen_or_why(table)
    assert slide is None and "not the slide that" in str(why)
    with pytest.raises(UsageError, match="not the slide that"):
        reopen_or_why(table, tmp_path / "s.tif", insist=True)
    slide, why = reopen_or_why(table, elsewhere, insist=True)
    assert slide is not None and why is None
    slide.close()


def test_a_slide_that_cannot_be_read_is_no_wrong_usage(table: CellTable, tmp_path: Path) -> None:
    (tmp_path / "s.tif").write_bytes(b"no slide")
    table.run.slide["sha256_head"] = None
    with pytest.raises(SlideError):
        reopen(table)
    for insist in (False, True):
        slide, why = reopen_or_why(table, tmp_path / "s.tif", insist=insist)
        assert slide is None and "s.tif" in str(why)
