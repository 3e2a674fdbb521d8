"""Memory that runs out: half the batch until it fits, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch

from cellslide.config import InferConfig
from cellslide.errors import CellslideError
from cellslide.inference.micro_batches import OnDevice


class Counting(OnDevice):
    """Runs out of memory on batches of more than `fits`; notes what was tried."""

    def __init__(self, fits: int) -> None:
        super().__init__(InferConfig(device="cpu"), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
        self.fits, self.batch_size, self.tried = fits, 8, list[int]()

    def too_large(self) -> str:
        return "give --less"

    def run(self) -> int:
        self.tried.append(self.batch_size)
        if self.batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.batch_size


def test_the_batch_is_halved_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    network = Counting(3)
    assert network.in_memory(network.run) == 2 and network.tried == [8, 4, 2]
    assert caplog.messages[-1] == "out of memory on cpu: going on with --batch-size 2"
    # What did not fit once is not tried again.
    assert network.in_memory(network.run) == 2 and network.tried == [8, 4, 2, 2]


def test_one_that_does_not_fit_says_what_to_do() -> None:
    network = Counting(0)
    with pytest.raises(CellslideError, match="give --less"):
        network.in_memory(network.run)
    assert network.tried == [8, 4, 2, 1]


def test_other_errors_are_not_for_want_of_memory() -> None:
    network = Counting(8)
    with pytest.raises(RuntimeError, match="sizes differ"):
        network.in_memory(lambda: _raise(RuntimeError("sizes differ")))
    assert network.batch_size == 8


def _raise(error: Exception) -> None:
    raise error


def test_images_are_normalised_by_channel() -> None:
    images = torch.full((1, 3, 2, 2), 255.0)
    assert Counting(1).normalised(images)[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]
