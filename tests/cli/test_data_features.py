"""`minigpt4 data features` as a user meets it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from minigpt4.cli.progress import counting_bar
from minigpt4.weights.files.stored_tensor import read_safetensors_header
from tests import tiny_chat
from tests.commands import Run, runner

PICTURES = 5


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capfd)


def held(store: Path) -> dict[str, tuple[dict[str, str], dict[str, bytes]]]:
    """What each shard holds; the library writes the keys of a header's metadata in any order."""
    made = {}
    for path in store.glob("*.safetensors"):
        with safe_open(path, "np") as shard:
            made[path.name] = shard.metadata(), {name: shard.get_tensor(name).tobytes() for name in shard.keys()}  # noqa: SIM118
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two stages over five pictures, one copy and one that is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(PICTURES):
        tiny_chat.picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "copy.txt").write_text("once more")
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder / "bad.txt").write_text("nothing")
    stage = {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1}
    content = {
        "model": str(tiny_chat.saved(tmp_path / "model")),
        "output": str(tmp_path / "run"),
        "trainable": ["language_projection"],
        "features": "cache",
        "data": {"sources": [{"path": str(folder)}], "crop": False},
        "stages": [{"name": "first", **stage}, {"name": "second", **stage}],
        "precision": "fp32",
        "workers": 0,
        "max_bad_fraction": 1.0,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_features_are_computed_once_and_then_trained_on(run: Run, recipe: Path, home: Path) -> None:
    done = run("data", "features", str(recipe))
    assert done.status == 0, done.err
    store = Path(done.out.strip())
    assert store.parent == home / "features" and store.name.startswith("qformer_outputs-")
    assert f"{PICTURES} pictures computed" in done.err
    assert "features of first  7 of 7 pictures" in done.err
    again = run("data", "features", str(recipe))
    assert (again.status, again.out) == (0, done.out)
    assert "0 pictures computed" in again.err and "train does not read them" not in done.err + again.err
    other = run("data", "features", str(recipe), "--set", "features=compute")
    assert "the recipe says features: compute, so train does not read them: set features=cache there" in other.err

    before = sorted(path.name for path in store.rglob("*"))
    trained = run("train", str(recipe))
    assert trained.status == 0, trained.err
    assert sorted(path.name for path in store.rglob("*")) == before


def test_training_computes_what_is_missing(run: Run, recipe: Path, home: Path) -> None:
    done = run("train", str(recipe))
    assert done.status == 0, done.err
    [store] = (home / "features").iterdir()
    assert len(list(store.glob("*.safetensors"))) == 1


def flip_a_bit_of_every_picture(store: Path) -> Path:
    """Damage the features in the one shard of a store, each picture's; what is read to open it stays whole."""
    [shard] = store.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    tensor = read_safetensors_header(shard)[0]["qformer_outputs"]
    for row in range(tensor.shape[0]):
        content[tensor.start + row * tensor.num_bytes // tensor.shape[0]] ^= 1
    shard.write_bytes(content)
    return shard


def losses(output: Path) -> list[object]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cure", ["data features", "remove"])
def test_damaged_features_end_a_run_and_what_the_hint_says_mends_them(
    cure: str, run: Run, recipe: Path, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run("train", str(recipe), "--set", f"output={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err
    [store] = (home / "features").iterdir()
    before = held(store)
    shard = flip_a_bit_of_every_picture(store)

    refused = run("train", str(recipe))
    assert (refused.status, refused.out) == (3, "")
    assert f"error: {shard} is damaged\n" in refused.err
    assert "hint: minigpt4 data features RECIPE.yaml finds what is damaged and computes it again\n" in refused.err

    if cure == "remove":
        shard.unlink()
    else:
        mended = run("data", "features", str(recipe))
        assert mended.status == 0, mended.err
        assert f"{shard} is damaged, and what it held is computed again" in caplog.messages
        assert f"features checked  {PICTURES} of {PICTURES} pictures" in mended.err
        assert f"{PICTURES} pictures computed" in mended.err
    goes_on = run("train", str(recipe))
    assert goes_on.status == 0, goes_on.err
    assert held(store) == before
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_computes_again_what_a_cut_off_shard_held(
    run: Run, recipe: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("data", "features", str(recipe)).status == 0
    [shard] = home.glob("features/*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    done = run("train", str(recipe))
    assert done.status == 0, done.err
    assert f"{shard} is damaged, and what it held is computed again" in caplog.messages


def test_cropped_pictures_are_refused_with_the_cure(run: Run, recipe: Path) -> None:
    done = run("data", "features", str(recipe), "--set", "data.crop=true")
    assert (done.status, done.out) == (2, "")
    assert "error: features: cache keeps what is seen in a whole picture, and stage first crops it anew" in done.err
    assert "hint: set data.crop=false" in done.err


def test_without_a_terminal_the_bar_tells_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with counting_bar("picture") as report:
        for done in range(0, 101, 4):
            report("features of it", done, 100)
            now += 4.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "features of it  32 of 100 pictures  1.0 a second, 68 s left",
        "features of it  64 of 100 pictures  1.0 a second, 36 s left",
        "features of it  96 of 100 pictures  1.0 a second, 4 s left",
        "features of it  100 of 100 pictures  1.0 a second",
    ]
