"""Probes: neighbours and a linear layer with known answers, splits, files, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cellslide.cli.main import cli
from cellslide.embed.probe import Labelled, ProbeConfig, knn_accuracies, linear_probe, load, probe, save
from cellslide.errors import UsageError
from tests.support.fake_muse import fake_muse
from tests.support.typed_set import write_typed_set


def clusters(n: int = 120, seed: int = 0, noise: float = 0.3) -> Labelled:
    """Three directions in six dimensions, in turn, of train, val and test."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    vector = np.eye(6)[label] * rng.uniform(1, 50, (n, 1)) + 0
    vector = vector * (1 + noise * rng.standard_normal((n, 6))) + 0.02 * rng.standard_normal((n, 6))
    split = tuple(("train", "train", "val", "test")[(i // 3) % 4] for i in range(n))
    return Labelled(vector.astype(np.float32), label.astype(np.int64), split, ("a", "b", "c"))


def test_neighbours_vote_by_cosine_and_nearness() -> None:
    # Length plays no part; with k = 3 the two far ones outvote the near one only if votes weighed the same.
    train = (torch.tensor([[10.0, 0], [1, 0.6], [0.9, 0.6]]), torch.tensor([0, 1, 1]))
    test = (torch.tensor([[1.0, 0.05]]), torch.tensor([0]))
    config = ProbeConfig(neighbours=(1, 3, 4))
    assert knn_accuracies(train, test, 2, config) == {1: 1.0, 3: 1.0, 4: None}
    even = replace(config, temperature=1000.0)
    assert knn_accuracies(train, test, 2, even) == {1: 1.0, 3: 0.0, 4: None}


def test_neighbours_are_those_of_a_plain_search() -> None:
    data = clusters(600, noise=1.5)
    train, test = data.of("train"), data.of("test")
    config = ProbeConfig(neighbours=(5, 20))
    found = knn_accuracies(train, test, 3, config)
    unit = [(part[0] / part[0].norm(dim=1, keepdim=True)).double().numpy() for part in (train, test)]
    cosine = unit[1] @ unit[0].T
    for k in (5, 20):
        right = 0
        for row, true in zip(cosine, test[1].numpy(), strict=True):
            near = np.argsort(-row)[:k]
            votes = np.bincount(train[1].numpy()[near], np.exp(row[near] / 0.07), 3)
            right += votes.argmax() == true
        assert found[k] == right / len(test[1])
    assert 0.5 < found[5] < 1, "neither trivial nor hopeless"


def test_linear_layer_learns_and_repeats() -> None:
    data = clusters()
    train, choose, test = (data.of(split) for split in ("train", "val", "test"))
    config = ProbeConfig(epochs=30, batch_size=16, learning_rate=0.05)
    score = linear_probe(train, choose, test, data.names, config)
    assert score.accuracy == 1.0 and score.recall == {"a": 1.0, "b": 1.0, "c": 1.0} and score.macro_f1 == 1.0
    assert score == linear_probe(train, choose, test, data.names, config)
    wrong = (test[0], (test[1] + 1) % 3)
    assert linear_probe(train, choose, wrong, data.names, config).accuracy == 0.0


def test_the_epoch_is_chosen_on_val_alone() -> None:
    data = clusters()
    train, test = data.of("train"), data.of("test")
    # Labels of val that no layer can meet but an untrained one by chance: every epoch is as good, so the last counts.
    choose = (torch.zeros(4, 6), torch.tensor([3, 3, 3, 3]))
    score = linear_probe(train, choose, test, data.names, ProbeConfig(epochs=7))
    assert (score.epoch, score.chosen_by) == (7, "best epoch on val")
    last = linear_probe(train, None, test, data.names, ProbeConfig(epochs=7))
    assert (last.epoch, last.chosen_by) == (7, "last epoch") and last.accuracy == score.accuracy


def test_report_names_its_splits() -> None:
    data = clusters()
    config = ProbeConfig(neighbours=(2, 500), epochs=20, batch_size=16)
    report = probe(data, "m", "d", config)
    assert (report.train_split, report.choose_split, report.test_split) == ("train", "val", "test")
    assert (report.n_train, report.n_choose, report.n_test, report.dim) == (60, 30, 30, 6)
    assert report.knn["500"] is None and report.knn_best == report.knn_chosen == report.knn["2"]
    assert json.loads(report.to_json())["knn"]["500"] is None
    without = replace(data, split=tuple("val" if s == "test" else "train" for s in data.split))
    report = probe(without, "m", "d", config)
    assert (report.choose_split, report.test_split, report.knn_chosen) == (None, "val", None)
    with pytest.raises(UsageError, match="no nucleus of the split train"):
        probe(replace(data, split=("val",) * len(data.split)), "m", "d", config)


def test_files_come_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    data, file = clusters(), tmp_path / "v.npz"
    save(file, data)
    again = load(file)
    np.testing.assert_array_equal(again.vector, data.vector)
    np.testing.assert_array_equal(again.label, data.label)
    assert (again.split, again.names) == (data.split, data.names)
    np.savez(file, embedding=data.vector, label=data.label + 5, split=np.array(data.split), names=np.array(data.names))
    with pytest.raises(UsageError, match="labels must lie between 0 and 2"):
        load(file)
    np.savez(file, embedding=data.vector)
    with pytest.raises(UsageError, match="must be .npz with embedding"):
        load(file)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["probe", *map(str, arguments)])


def test_command_on_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.weights.muse.load_muse", lambda *args: fake_muse())
    root = write_typed_set(tmp_path / "set", images=4)
    quick = ("--device", "cpu", "--no-progress", "--k", "1,5,100", "--epochs", "50")
    result = run(root, *quick, "--json", tmp_path / "p.json", "--save", tmp_path / "new" / "v.npz")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "p.json").read_text())
    assert scores["knn"] == {"1": 1.0, "5": 1.0, "100": None} and scores["model"] == "fake-muse"
    assert scores["classes"] == ["blue", "pink"] and (scores["n_train"], scores["n_test"]) == (18, 18)
    assert "knn, best k" in result.output
    again = run(tmp_path / "new" / "v.npz", "--k", "1,5,100", "--epochs", "50", "--json", tmp_path / "q.json")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "q.json").read_text())["linear"] == scores["linear"]
    both = run(tmp_path / "new" / "v.npz", "--model", "muse-vit-s-224")
    assert both.exit_code == 2 and "without --model" in both.output


def test_labels_decide_what_neighbours_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.weights.muse.load_muse", lambda *args: fake_muse())
    root = write_typed_set(tmp_path / "set", images=4, wrong=3)
    result = run(root, "--device", "cpu", "--no-progress", "--k", "5", "--epochs", "1", "--json", tmp_path / "p.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "p.json").read_text())["knn"]["5"] < 1
