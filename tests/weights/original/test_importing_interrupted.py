"""An import that is killed, or that meets an error of the disk, leaves no half of a model; run again it goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.files.model_writer import kept_note
from minigpt4.weights.original.importing import Imported, import_original
from minigpt4.weights.original.names import OriginalFiles
from tests.weights.files.faults import Fault
from tests.weights.original import original_files

ROOT = Path(__file__).resolve().parents[3]
HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]
SHARD = 30_000
SOME = 8
"""Calls that are tried in the fast test, of some 2000."""


def run(folder: Path, **options: Any) -> Imported:
    files = OriginalFiles(
        vision=folder / "eva_vit_g.pth",
        language_model=folder / "vicuna",
        qformer=folder / "blip2_pretrained_flant5xxl.pth",
        projection=folder / "pretrained_minigpt4.pth",
    )
    return import_original(folder / "out", files, overrides=HEADS, shard_bytes=SHARD, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path) -> tuple[dict[str, bytes], int]:
    """Import without a fault; return what comes out, and the number of calls."""
    with Fault(0, lambda place: None, transfers=True) as fault:
        run(folder)
    made = content(folder / "out")
    shutil.rmtree(folder / "out")
    return made, fault.count


def finish(folder: Path, expected: dict[str, bytes]) -> int:
    """Check that the target is absent or whole, make it, and return how many files were kept."""
    out = folder / "out"
    if out.exists():
        assert content(out) == expected
        shutil.rmtree(out)
    kept = next((note for note in run(folder).notes if "interrupted run" in note), "0 files")
    verify_folder(out)
    assert content(out) == expected
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    shutil.rmtree(out)
    return int(kept.split()[0])


def killer(number: int) -> Callable[[str, int, int], None]:
    """Make a report that kills the process when it is told for the given time."""
    told: list[int] = []

    def report(what: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


def kill_everywhere(place: str) -> None:
    """Kill an import after each of its weight files, and at some calls; prints what the next runs kept."""
    folder = Path(place)
    original_files.write(folder)
    expected, count = whole(folder)
    shards = sum(name.endswith(".safetensors") for name in expected)
    kept = []
    for number in range(1, shards + 1):
        if os.fork() == 0:
            run(folder, report=killer(number))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
        assert not (folder / "out").exists()
        kept.append(finish(folder, expected))
    chance = random.Random(0)
    for step in range(SOME // 2):
        if os.fork() == 0:
            with Fault(1 + int((step + chance.random()) * count * 2 / SOME), lambda place: os._exit(9), transfers=True):
                run(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        finish(folder, expected)
    print(json.dumps(kept))


def test_killed_import_goes_on_with_the_files_it_had_and_makes_the_same_bytes(tmp_path: Path) -> None:
    code = f"import sys; from {__name__} import kill_everywhere; kill_everywhere(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads(done.stdout.splitlines()[-1])
    assert len(kept) > 3
    assert kept == list(range(1, len(kept) + 1))


def test_import_that_replaces_keeps_the_old_model_until_the_end_and_goes_on(tmp_path: Path) -> None:
    original_files.write(tmp_path)
    run(tmp_path)
    before = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "vicuna")
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4.pth"):
        (tmp_path / name).unlink()
    original_files.write(tmp_path, seed=5)
    told: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, overwrite=True, report=stop)
    assert content(tmp_path / "out") == before

    done = run(tmp_path, overwrite=True)

    assert "2 files were there from an interrupted run" in done.notes
    assert kept_note(1) == "1 file was there from an interrupted run"
    verify_folder(tmp_path / "out")
    assert content(tmp_path / "out") != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
