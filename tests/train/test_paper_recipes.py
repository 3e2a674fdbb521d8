"""The papers' recipes: each is read as it stands, and a tiny network takes a few steps on a twin of its data set."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.evaluate.dataset import write_manifest
from cellslide.train.data import choose_samples
from cellslide.train.fit import fit
from cellslide.train.nuclass.recipe import load_nuclass_recipe
from cellslide.train.recipe import DatasetConfig, ValConfig
from cellslide.train.task import FitOptions, TrainingTask
from cellslide.train.tasks import celldetr, hover, nuclass, points
from tests.conftest import CHECKOUT
from tests.support.labelled import add_image, discs
from tests.support.layouts import write_conic, write_nuclass, write_ocelot, write_pannuke, write_puma
from tests.train.test_celldetr import TINY as TINY_DETR
from tests.train.test_cellvta import TINY as TINY_VTA
from tests.train.test_nuclass import BACKBONE
from tests.train.test_points import TINY as TINY_POINTS

RECIPES = CHECKOUT / "examples" / "papers"
SHORT = {"batch_size": 2, "epoch_samples": 4, "epochs": 1, "precision": "fp32"}
HEAD = {"hidden": 16, "space_px": 8, "aux_mask": True}
MUSE = {"field_px": 64, "model": {"config": {**TINY_POINTS, "head": HEAD}}}
DETR = {"crop_px": 64, "tile_px": 64, "model": {"config": TINY_DETR}}
NUCLASS = {
    "local": {"input_px": 16}, "context": {"input_px": 16},
    "model": {"local": BACKBONE, "context": BACKBONE, "head_width": 8, "proj_width": 4, "gate_width": 4},
}  # fmt: skip


def vta(n: int) -> dict[str, Any]:
    return {"crop_px": 32, "model": {"config": {**TINY_VTA, "num_nuclei_classes": n}}}


def pannuke(root: Path) -> None:
    kinds = [("neoplastic", "inflammatory"), ("connective", "dead"), ("epithelial", "neoplastic")] * 2
    for fold in (1, 2, 3):
        write_pannuke(root, fold, ["Breast", "Colon"] * 3, kinds)


def conic(root: Path) -> None:
    root.mkdir(parents=True)
    write_conic(root, [f"glas_{i}-0001" for i in range(12)], [("plasma", "lymphocyte")] * 12)


def brca(root: Path) -> None:
    labels = discs((64, 64), [(20, 20), (44, 44)], 6)
    names = [(20, 20, "lymphocyte"), (44, 44, "stromal")]
    rows = [add_image(root, s, labels, mask=False, points=names, split=s, mpp="0.5") for s in ("train", "val")]
    write_manifest(root, rows)


def puma(root: Path) -> None:
    write_puma(root, ["tumor", "plasma_cell", "stroma"])


def cells(root: Path) -> None:
    for split in ("train", "val"):
        write_nuclass(
            root, [(f"{split}-{k}", k, organ) for k, organ in enumerate(("lung", "liver", "spleen"))], False, split
        )


def recipe(task: TrainingTask, name: str, folder: Path, tiny: Mapping[str, Any], options: FitOptions) -> Any:
    """Return a recipe with a tiny network, read from a file; the recipe as it stands is read first."""
    text = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    if task not in nuclass.TASKS[1:]:
        task.load_recipe(RECIPES / f"{name}.yaml", {}, options).network()
    small = folder / f"{name}.yaml"
    small.write_text(yaml.safe_dump(merged(text, {**SHORT, **tiny})))
    return task.load_recipe(small, {}, options)


def merged(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others over them, at every depth; a network's configuration is replaced."""
    both = {key: merged(whole[key], value) for key, value in part.items()
            if isinstance(value, dict) and isinstance(whole.get(key), dict) and key != "config"}  # fmt: skip
    return {**whole, **part, **both}


@pytest.mark.parametrize(
    ("task", "name", "data", "write", "tiny"),
    [
        (hover.TASK, "cellvta-pannuke", "pannuke", pannuke, vta(6)),
        (hover.TASK, "cellvta-conic", "conic", conic, vta(7)),
        (celldetr.TASK, "celldetr-pannuke", "pannuke", pannuke, DETR),
        (celldetr.TASK, "celldetr-pannuke-probe", "pannuke", pannuke, DETR),
        (points.TASK, "muse-brca-m2c", "brca-m2c", brca, MUSE),
        (points.TASK, "muse-ocelot", "ocelot", write_ocelot, MUSE),
        (points.TASK, "muse-puma", "puma", puma, MUSE),
    ],
)  # fmt: skip
def test_recipe_runs_on_a_twin(
    task: TrainingTask, name: str, data: str, write: Callable[[Path], None], tiny: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / data)
    options = FitOptions(tmp_path / "run", [tmp_path / data], "cpu", 0, max_steps=2, log_every=1000)
    module = fit(task, recipe(task, name, tmp_path, tiny, options), options)
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert module.global_step == 2 and card["data"][0]["train"]["images"] > 0, card
    if name == "celldetr-pannuke":
        shown = card["data"][0]
        assert shown["train"]["images"] + shown["val"]["images"] == 12
        assert not any(image.startswith("fold3") for image in shown["val_images"])
    if name.endswith("probe"):
        learning = {n for n, p in module.model.named_parameters() if p.requires_grad}
        assert learning and all(n.startswith("decouple_class_embed") for n in learning)


def test_three_stages_of_nuclass_run_on_a_twin(tmp_path: Path) -> None:
    data, runs = tmp_path / "nuclass", {s: tmp_path / s for s in ("local", "global", "gate")}
    cells(data)
    before: dict[str, Any] = {}
    for task, stage in zip(nuclass.TASKS, runs, strict=True):
        tiny = NUCLASS if stage == "local" else {"context": NUCLASS["context"]} if stage == "gate" else {}
        options = FitOptions(runs[stage], [data], "cpu", 0, max_steps=2, log_every=1000, extra=dict(before))
        for last in before.values():  # as it stands, over the network of the twin
            load_nuclass_recipe(RECIPES / f"nuclass-{stage}.yaml", {}, last)
        fit(task, recipe(task, f"nuclass-{stage}", tmp_path, tiny, options), options)
        before[f"{stage}_run"] = runs[stage]
        assert (runs[stage] / "model.safetensors").is_file()


def test_a_share_of_the_patients_validates(tmp_path: Path) -> None:
    conic(tmp_path / "conic")
    config = {"conic": DatasetConfig(split=("train",), val=ValConfig(share=0.4))}
    (chosen,) = choose_samples([tmp_path / "conic"], config, DatasetConfig())
    train, val = ({s.patient for s in part} for part in (chosen.train, chosen.val))
    assert train and val and not train & val and all(s.split == "train" for s in (*chosen.train, *chosen.val))


def test_mean_of_three_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(3):
        (tmp_path / f"{k}.json").write_text(json.dumps({"instance": {"bpq": 0.5 + k / 10, "aji": None}, "model": "m"}))
    runpy.run_path(str(RECIPES / "mean.py"))["main"]([str(tmp_path / f"{k}.json") for k in range(3)])
    assert capsys.readouterr().out.split() == ["instance.bpq", "0.6000", "(0.5000", "to", "0.7000)"]
