"""Several processes learn what one learns, and the end of one is the end of all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minigpt4.training.checkpoint import last_checkpoint
from minigpt4.training.samples import read_rounds
from tests import tiny_chat

ROOT = Path(__file__).resolve().parents[2]
TOY = ["-m", "tests.training.toy_process"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def start(output: Path, *options: str, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    return launch([*TOY, str(output), *options], processes)


def launch(program: list[str], processes: int) -> "subprocess.CompletedProcess[str]":
    command = [*(TORCHRUN if processes == 2 else [sys.executable]), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def losses(output: Path, stage: str) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_have_the_losses_of_one(parallel: str, accumulation: int, tmp_path: Path) -> None:
    """To rounding."""
    options = ("--dropout", "0", "--accumulation", str(accumulation))
    assert start(tmp_path / "one", *options, processes=1).returncode == 0

    done = start(tmp_path / "two", *options, "--parallel", parallel)

    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two", "second") == pytest.approx(losses(tmp_path / "one", "second"), rel=1e-5)
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("key.bias"):
            continue  # its gradient is nothing but rounding, of which Adam makes steps of full size
        # As a whole: single weights whose gradient is next to nothing get steps of any size from Adam.
        assert (two[name] - tensor).norm() < 1e-4 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_killed_process_ends_all_and_the_run_goes_on(parallel: str, tmp_path: Path) -> None:
    options = ("--parallel", parallel, "--steps", "4")
    assert start(tmp_path / "whole", *options).returncode == 0
    started = time.monotonic()

    killed = start(tmp_path / "killed", *options, "--kill-after", "3")

    assert killed.returncode != 0
    assert time.monotonic() - started < 60  # 30 s after the kill; the rest is the start
    resumed = start(tmp_path / "killed", *options)
    assert resumed.returncode == 0, resumed.stderr
    whole, after = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], after[name]) for name in whole)
    assert losses(tmp_path / "whole", "second") == losses(tmp_path / "killed", "second")


JOINED = """
import sys
import torch
from minigpt4.training.processes import joined, summed

before = sys.argv[1] == "before"
if before:
    torch.distributed.init_process_group("gloo")
with joined() as here:
    assert summed([1.0], here) == [2.0]
assert torch.distributed.is_initialized() == before
if before:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("joined", ["before", "here"])
def test_the_group_is_left_at_the_end_if_it_was_joined_here(joined: str, tmp_path: Path) -> None:
    """Else the program may abort. A program makes one group, as a second may find the addresses of the first."""
    (tmp_path / "joined.py").write_text(JOINED)

    done = launch([str(tmp_path / "joined.py"), joined], processes=2)

    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_second_process_killed_in_the_forward_pass_ends_the_first(tmp_path: Path) -> None:
    killed = start(tmp_path, "--die-rank", "1")

    assert killed.returncode != 0
    assert not (tmp_path / "final.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_told_to_stop_by_a_scheduler_and_again_by_torchrun_save_what_they_have(tmp_path: Path) -> None:
    """A scheduler tells torchrun, its processes and their workers, and torchrun then tells the latter once more."""
    options = ("--steps", "100000", "--checkpoint-steps", "100000", "--workers", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*TORCHRUN, *TOY, str(tmp_path), *options], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as torchrun:
        metrics = tmp_path / "metrics.jsonl"
        while torchrun.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            time.sleep(0.1)
        started = descendants(torchrun.pid)
        for process in (torchrun.pid, *started):
            os.kill(process, signal.SIGTERM)
        _, said = torchrun.communicate(timeout=120)

    assert len(started) >= 4  # two processes and their workers
    found = last_checkpoint(tmp_path)
    assert found is not None, said
    assert found[1].step == len(losses(tmp_path, "first")) > 3


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that these did."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def validated_run(folder: Path, name: str, processes: int, **changes: Any) -> Path:
    """Train on some pictures and validate on others, as `minigpt4 train` does; returns the run's folder."""
    content = {
        "model": str(folder / "model"),
        "output": str(folder / name),
        "trainable": ["language_projection"],
        "data": {"sources": [{"path": str(folder / "pictures")}], "crop": False},
        "validation": {"sources": [{"path": str(folder / "pictures")}], "every_steps": 1, "batches": 2, "pictures": 3},
        "stages": [{"name": "only", "steps": 2, "batch_size": 4 // processes, "learning_rate": 0.01, "threads": 1}],
        "precision": "fp32",
        "workers": 0,
        **changes,
    }
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    done = launch(["-m", "minigpt4", "train", str(recipe)], processes)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("features", ["compute", "cache"])
def test_processes_that_have_a_part_of_the_model_each_validate_as_one_does(features: str, tmp_path: Path) -> None:
    tiny_chat.saved(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        tiny_chat.picture(number).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"picture {number}")

    one = validated_run(tmp_path, "one", 1)
    two = validated_run(tmp_path, "two", 2, parallel="fsdp2", features=features)

    assert validation_losses(two) == pytest.approx(validation_losses(one), rel=1e-5)
    assert len(validation_losses(two)) == 2
    rounds = [[sample.answer for sample in entry.samples] for entry in read_rounds(two)]
    assert rounds == [[sample.answer for sample in entry.samples] for entry in read_rounds(one)]
    assert [len(answers) for answers in rounds] == [3, 3]


def validation_losses(output: Path) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]
