"""Maps handed over in shared memory: the same maps, in few blocks, and nothing left behind."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import numpy as np
import pytest

from cellslide.inference import shared_memory as handing
from cellslide.inference.shared_memory import Blocks, MapsNotSeen, attach
from cellslide.types import HoverMaps

pytestmark = pytest.mark.skipif(not os.path.isdir(handing.FOLDER), reason="no shared memory as Linux has it")


def maps(size: int, seed: int, typed: bool = True) -> HoverMaps:
    rng = np.random.default_rng(seed)
    prob = rng.random((4, size, size + 1)).astype(np.float16)
    hv = rng.random((2, size, size + 1)).astype(np.float32)
    return HoverMaps((prob[0] > 0.5).astype(np.uint8), prob[0], hv, prob if typed else None)


def same(a: HoverMaps, b: HoverMaps) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(HoverMaps)]
    return all((x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("typed", [True, False])
def test_the_same_maps_arrive(typed: bool) -> None:
    blocks, given = Blocks(), [maps(33, seed, typed) for seed in (0, 1)]
    handed = [blocks.put(each) for each in given]
    assert all(same(attach(there), each) for there, each in zip(handed, given, strict=True) if there is not None)
    assert None not in handed and len({there.block for there in handed if there is not None}) == 2
    blocks.close()


def test_a_block_that_was_given_back_serves_again_where_it_is_large_enough() -> None:
    blocks = Blocks()
    first = blocks.put(maps(40, 0))
    assert first is not None
    blocks.give_back(first)
    smaller, larger = blocks.put(maps(20, 1)), blocks.put(maps(80, 2))
    assert smaller is not None and larger is not None
    assert smaller.block == first.block != larger.block
    assert same(attach(smaller), maps(20, 1)) and same(attach(larger), maps(80, 2))
    blocks.close()


def test_nothing_is_left_behind() -> None:
    before, files = set(os.listdir(handing.FOLDER)), len(os.listdir("/proc/self/fd"))
    blocks = Blocks()
    used, free = blocks.put(maps(20, 0)), blocks.put(maps(20, 1))
    assert used is not None and free is not None
    assert set(os.listdir(handing.FOLDER)) == before
    blocks.give_back(free)
    blocks.close()
    blocks.give_back(used)  # whoever had it may be late
    assert blocks._free == [] and len(os.listdir("/proc/self/fd")) <= files + 2  # two mappings keep theirs open


def test_without_room_there_is_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    blocks = Blocks()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert blocks.put(maps(20, 0)) is None
    monkeypatch.setattr(handing, "FOLDER", "/nowhere")
    assert Blocks().put(maps(20, 0)) is None


def test_who_may_not_see_a_block_says_so_and_none_is_handed_over_again() -> None:
    blocks = Blocks()
    handed = blocks.put(maps(20, 0))
    assert handed is not None
    with pytest.raises(MapsNotSeen):
        attach(replace(handed, block=-1, path="/nowhere"))
    blocks.give_up()
    blocks.give_back(handed)
    assert blocks.put(maps(20, 0)) is None
    blocks.close()
