"""Artefacts drawn onto crops: what is hidden is background, what is in doubt is not known, all else stays."""

from __future__ import annotations

import numpy as np
import pytest

from cellslide.train.artefacts import ARTEFACTS, add_artefact, bubble, fold, ink, out_of_focus, without_remnants
from cellslide.train.recipe import AugmentConfig
from cellslide.train.targets import IGNORE
from tests.support.train_sets import painted


def _crop() -> tuple[np.ndarray, np.ndarray]:
    image, labels, _ = painted(1, size=256, n=100)
    return image, labels.astype(np.int32)


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_labels_are_kept_hidden_or_not_known(artefact) -> None:
    image, labels = _crop()
    before = image.copy()
    for seed in range(12):
        changed, left = artefact(np.random.default_rng(seed), image, labels)
        assert changed.shape == image.shape and changed.dtype == np.uint8 and left.dtype == np.int32
        moved = left != labels
        assert np.isin(left[moved], (0, IGNORE)).all()
        # Far from what was drawn nothing changes, neither picture nor labels.
        same = (changed == image).all(-1)
        assert not (moved & same & (labels > 0)).any() or artefact is bubble
    np.testing.assert_array_equal(image, before)


def test_what_is_out_of_focus_is_background_and_its_border_not_known() -> None:
    image, labels = _crop()
    found = [out_of_focus(np.random.default_rng(seed), image, labels)[1] for seed in range(20)]
    assert any(((left == 0) & (labels > 0)).any() and (left == IGNORE).any() for left in found)


def test_thin_ink_leaves_the_labels_and_opaque_ink_hides_them() -> None:
    image, labels = _crop()
    kept = [bool((ink(np.random.default_rng(seed), image, labels)[1] == labels).all()) for seed in range(30)]
    assert 5 < sum(kept) < 25


def test_folds_and_bubbles_are_not_known() -> None:
    image, labels = _crop()
    for artefact in (fold, bubble):
        left = [artefact(np.random.default_rng(seed), image, labels)[1] for seed in range(10)]
        assert any((found == IGNORE).any() for found in left)
        assert all((found[found != IGNORE] == labels[found != IGNORE]).all() for found in left)


def test_a_nucleus_that_lost_a_third_is_not_known() -> None:
    before = np.zeros((10, 30), np.int32)
    before[:, :10], before[:, 10:20] = 1, 2
    after = before.copy()
    after[:, :5] = 0  # half of the first
    after[:, 10:12] = 0  # a fifth of the second
    left = without_remnants(before, after)
    assert (left[:, 5:10] == IGNORE).all() and (left[:, 12:20] == 2).all() and (left[:, 20:] == 0).all()


def test_a_share_of_the_draws_is_changed() -> None:
    image, labels = _crop()
    calm, some = AugmentConfig(), AugmentConfig(artefact_p=0.5)
    assert add_artefact(np.random.default_rng(0), calm, image, labels)[0] is image
    changed = [add_artefact(np.random.default_rng(seed), some, image, labels)[0] is not image for seed in range(200)]
    assert 70 < sum(changed) < 130
