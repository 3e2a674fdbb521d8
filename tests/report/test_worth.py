"""What the report says of the weights: the manifest's scores, those of the slide's organ first, nothing made up."""

from __future__ import annotations

from typing import Any

from cellslide.report.worth import worth
from cellslide.types import RunRecord, WeightsRef
from cellslide.weights.manifest import Manifest


def record(typing: dict[str, Any] | None, *ids: str, sha256: str | None = None) -> RunRecord:
    entries = [Manifest.load().entry(name) for name in ids]
    refs = [WeightsRef(e.id, sha256 or e.sha256 or "", e.licence or "") for e in entries]
    config = {} if typing is None else {"classify": typing}
    return RunRecord("1", "done", {}, config, refs, "cpu", "torch", "fp32", 0, "now")


def spec(**calibration: float) -> dict[str, Any]:
    return {"weights_id": "cells-breast-colon", "organs": ["breast", "colon"], "calibration": calibration}


BOTH = ("cellslide-nuclei-light", "cells-breast-colon")


def test_scores_of_the_organ_stand_first() -> None:
    found = worth(record({"organ": "colon", "organ_trained": True, "spec": spec()}, *BOTH))
    here = [score for score in found.scores if score.here]
    assert here == list(found.scores[: len(here)]) and {s.images.split()[0].strip(",") for s in here} == {"consep"}
    manifest = Manifest.load().entry(BOTH[0]).metrics["consep, tiles 23 to 27"]
    assert (here[0].found, here[0].outlined) == (manifest["detection_f1"], manifest["bpq"])
    assert not any("classical" in score.images for score in found.scores)
    assert "trained on colon" in found.sentences[0] and "colon stand first" in found.sentences[1]


def test_an_organ_that_was_not_trained_is_said_with_what_is_known() -> None:
    typing = {"organ": "liver", "organ_trained": False, "spec": spec()}
    found = worth(record(typing, *BOTH))
    assert (
        "not trained on liver (trained: breast, colon)" in found.sentences[0]
        and "has not been measured" in found.sentences[0]
    )
    assert not any(score.here for score in found.scores) and "other organs" in found.sentences[1]
    measured = worth(record({**typing, "spec": spec(accuracy_unseen=0.62)}, *BOTH))
    assert "left out of training it typed 62%" in measured.sentences[0]


def test_other_files_have_no_scores() -> None:
    found = worth(record(None, BOTH[0], sha256="0" * 64))
    assert not found.scores and "No scores are known of cellslide-nuclei-light" in found.sentences[0]
