"""The examples of clusters: they name options that exist, and those that can run here do."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cellslide.cli.main import cli
from cellslide.store.run_record import read_record
from tests.conftest import CHECKOUT
from tests.painted import paint_slide

EXAMPLES = CHECKOUT / "examples"
RECIPES = [
    EXAMPLES / name for name in ("slurm/array.sbatch", "snakemake/Snakefile", "nextflow/main.nf", "kubernetes/job.yaml")
]
# cellslide with the fake network in place of the one that ships.
FAKE = (
    "import sys, cellslide.weights, cellslide.weights.classifier\n"
    "from tests.support.cluster_fakes import load_deadly, load_fake_classifier\n"
    "cellslide.weights.load_model, cellslide.weights.classifier.load_classifier = load_deadly, load_fake_classifier\n"
    "from cellslide.cli.main import cli\n"
    "cli(sys.argv[1:])\n"
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_options_are_those_of_the_command(path: Path) -> None:
    command = cli.get_command(None, "run")  # type: ignore[arg-type]
    known = {name for parameter in command.params for name in parameter.opts}
    text = re.sub(r"^\s*(#|//).*$", "", path.read_text(), flags=re.MULTILINE)
    call = text[re.search(r"cellslide[})\"]* run|CELLSLIDE:-cellslide} run", text).start() :]  # type: ignore[union-attr]
    used = set(re.findall(r"(?<!\S)(--[a-z-]+)", call.split("resources:")[0].split('"""')[0]))
    used -= {"--array"}
    assert {"--output", "--shard"} <= used and used <= known, used - known


def test_qupath_script_gives_options_of_the_command() -> None:
    command = cli.get_command(None, "run")  # type: ignore[arg-type]
    known = {name for parameter in command.params for name in parameter.opts}
    text = (EXAMPLES / "qupath" / "run_cellslide.groovy").read_text()
    used = set(re.findall(r'"(--[a-z-]+)"', text))
    assert {"--roi", "--output", "--organ", "--format"} <= used <= known
    code = re.sub(r"^//.*$", "", text, flags=re.MULTILINE)
    assert all(code.count(a) == code.count(b) for a, b in ("{}", "()", "[]"))


def test_kubernetes_job_is_whole() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes" / "job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["kind"] == "Job" and spec["completionMode"] == "Indexed"
    assert {"name": "SHARDS", "value": str(spec["completions"])} in container["env"]
    mounts, volumes = ({v["name"] for v in found} for found in (container["volumeMounts"], pod["volumes"]))
    assert mounts == volumes
    script = container["args"][0]
    answer = subprocess.run(
        ["sh", "-c", script.replace("exec cellslide", "exec echo")],
        env={**os.environ, "JOB_COMPLETION_INDEX": "3", "SHARDS": "16"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--shard 4/16" in answer.stdout


def slurm(tmp_path: Path, worker: str, **environment: str) -> subprocess.Popen[str]:
    """Start the array script with `worker` as cellslide and a `scontrol` that notes what it is asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path / "asked"))}\n')
    scontrol.chmod(0o755)
    script = tmp_path / "worker"
    script.write_text(f"#!/usr/bin/env bash\n{worker}\n")
    script.chmod(0o755)
    known = {
        "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_JOB_ID": "77", "CELLSLIDE": str(script), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    arguments = ["bash", str(EXAMPLES / "slurm" / "array.sbatch"), "my slides.csv", "out", "--organ", "breast"]
    return subprocess.Popen(
        arguments, env={**os.environ, **known, **environment}, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )


def test_slurm_task_takes_its_share_and_its_code(tmp_path: Path) -> None:
    process = slurm(tmp_path, 'printf "%s|" "$@"; exit 1')
    out, _ = process.communicate(timeout=100)
    assert out == "run|my slides.csv|--output|out|--shard|2/4|--no-progress|--organ|breast|"
    assert process.returncode == 1 and not (tmp_path / "asked").exists()


# Stops as cellslide does: some time after the warning, with 143.
STOPS = 'trap "sleep 0.3; exit 143" USR1; touch ready; while :; do sleep 0.05; done'


@pytest.mark.parametrize(("restarts", "asked"), [("0", True), ("20", False)])
def test_slurm_warning_requeues_the_task(tmp_path: Path, restarts: str, asked: bool) -> None:
    process = slurm(tmp_path, STOPS, SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 100
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=100)
    assert process.returncode == 143
    assert (tmp_path / "asked").exists() == asked
    if asked:
        assert (tmp_path / "asked").read_text().strip() == "requeue 77_6"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_scripts_are_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


def test_nextflow_files_are_balanced() -> None:
    for path in (EXAMPLES / "nextflow").glob("*.[nc]*"):
        text = re.sub(r"//.*", "", path.read_text())
        for opening, closing in ("{}", "()", "[]"):
            assert text.count(opening) == text.count(closing), f"{path}: {opening}"
        assert text.count('"""') % 2 == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_snakemake_runs_two_slides(tmp_path: Path) -> None:
    if importlib.util.find_spec("snakemake") is None:
        pytest.skip("snakemake is not installed: pip install 'cellslide[test]'")
    for name in ("a", "b"):
        paint_slide(tmp_path / f"{name}.tif", 300, 200, 0.5, [(60, 60), (180, 120)], 7.0, (1,))
    (tmp_path / "slides.csv").write_text("path\na.tif\nb.tif\n")
    (tmp_path / "fake.py").write_text(FAKE)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(EXAMPLES / "snakemake" / "Snakefile"), "--cores", "1",
        "--quiet", "--nolock", "--config", "slides=slides.csv", "output=out", "shards=2", "threads=1",
        f"cellslide={shlex.quote(sys.executable)} fake.py", "options=--no-tissue --device cpu --workers 0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for name in ("a", "b"):
        record = read_record(tmp_path / "out" / name)
        assert record is not None and record.counts.nuclei == 2 and "classify" in record.config
    assert {p.name for p in (tmp_path / "shards").iterdir()} == {"1-of-2.done", "2-of-2.done"}
