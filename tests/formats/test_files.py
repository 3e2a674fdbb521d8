"""Files of an earlier version are made anew as one step: killed anywhere, the next run does it again, wholly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cellslide.config import OutputConfig
from cellslide.formats.files import renew_files, write_missing
from cellslide.formats.registry import export_table
from cellslide.progress import IDLE
from cellslide.store.cell_table import open_table
from cellslide.store.file_list import changed_sizes
from cellslide.store.run_record import read_record, write_record
from tests.support.older_table import make_version_1
from tests.support.random_cells import ellipses, run_record, write_table

FILES = ("cells.geojson.gz", "cells.csv.gz", "run.json")
# What the process is killed at: the first or the second of the files, the table, or the record after it.
KILLED = """
import os, sys
from pathlib import Path
from cellslide.formats import files
def killed(*given, **named): os._exit(137)
if sys.argv[2] == "table":
    files.TableExtender = killed
elif sys.argv[2] == "record":
    files.write_record = killed
else:
    import dataclasses
    present = files.present_formats(Path(sys.argv[1]))
    k = [f.name for f in present].index(sys.argv[2])
    present[k] = dataclasses.replace(present[k], writer=killed)
    files.present_formats = lambda folder: present
files.renew_files(Path(sys.argv[1]))
"""


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path, ellipses(40)).close()
    with open_table(tmp_path / "cells.zarr") as table:
        export_table(table, tmp_path, ("geojson", "csv"))
    write_record(tmp_path, run_record())
    make_version_1(tmp_path / "cells.zarr")
    return tmp_path


@pytest.mark.parametrize("at", ["geojson", "csv", "table", "record"])
def test_killed_where_files_are_renewed(folder: Path, at: str) -> None:
    expected = {name: (folder / name).read_bytes() for name in FILES[:2]}
    for name in FILES[:2]:
        (folder / name).write_bytes(b"of another meaning")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), at], capture_output=True, text=True, check=False)
    assert done.returncode == 137, done.stderr
    with open_table(folder / "cells.zarr") as table:
        assert table.version == (2 if at == "record" else 1)
    renew_files(folder)
    record = read_record(folder)
    assert record is not None and record.status == "done"
    # Killed after the table the list of files is an old one: the same command makes good what it does not name.
    write_missing(folder, OutputConfig(formats=("geojson", "csv")), record, IDLE, changed_sizes(folder))
    assert not changed_sizes(folder)
    assert {name: (folder / name).read_bytes() for name in FILES[:2]} == expected
    with open_table(folder / "cells.zarr") as table:
        assert table.version == 2 and len(table) == 40
