"""`minigpt4 train plot DIR` draws, and `minigpt4 train RECIPE.yaml` still trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import cli
from minigpt4.cli.train import join_names


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    line = {"stage": "words", "step": 1, "steps": 9, "loss": 2.5, "learning_rate": 1e-4, "seconds": 1.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "run"


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command and return its status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["minigpt4", *arguments])
    status = 0
    try:
        cli.main()
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_picture_is_drawn_and_named(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(monkeypatch, capsys, "train", "plot", str(run_folder)) == (0, f"{run_folder / 'metrics.png'}\n", "")
    with Image.open(run_folder / "metrics.png") as picture:
        assert picture.format == "PNG"


def test_picture_goes_where_it_is_wanted(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run_folder.parent / "elsewhere" / "curves.png"

    assert told(monkeypatch, capsys, "train", "plot", str(run_folder), "--output", str(target))[:2] == (
        0,
        f"{target}\n",
    )
    assert target.is_file()
    assert not (run_folder / "metrics.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plot"], "missing argument 'DIR'"),
        (["plot", "nowhere"], "'nowhere' holds no metrics.jsonl"),
        (["plot", "nowhere", "--output", "a.jpg"], "ends in .png"),
        (["plot", "nowhere", "--set", "a=b"], "no such option: --set"),
        (["nowhere.yaml"], "recipe nowhere.yaml"),
        (["./plot"], "recipe plot"),  # a recipe of that name
    ],
)
def test_mistake_is_told_in_a_sentence_and_a_hint(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = told(monkeypatch, capsys, "train", *arguments)

    assert (status, out) == (2, "")
    assert words in err.splitlines()[0]
    assert err.splitlines()[1].startswith("hint: ")


def test_help_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage: minigpt4 train plot" in told(monkeypatch, capsys, "train", "plot", "--help")[1]
    assert "train plot" in told(monkeypatch, capsys, "--help")[1]


@pytest.mark.parametrize(
    "arguments",
    [["train", "recipe.yaml"], ["train"], [], ["plot", "train"], ["ask", "train", "plot"], ["train", "--set"]],
)
def test_other_commands_are_left_alone(arguments: list[str]) -> None:
    assert join_names(arguments) == arguments


def test_plotting_does_without_torch(run_folder: Path) -> None:
    code = "import sys; from minigpt4 import cli; cli.main(); sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", code, "train", "plot", str(run_folder)], check=True, timeout=120)
