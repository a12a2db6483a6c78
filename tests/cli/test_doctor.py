"""`minigpt4 weights inspect` and `minigpt4 doctor` as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from minigpt4.weights.checking import doctor
from minigpt4.weights.checking.doctor import Device, Library
from tests.commands import Result, Run, runner
from tests.weights.original import original_files


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return original_files.write(tmp_path)


def refused(result: Result, *words: str) -> None:
    """Check that a mistake is told as it should be: one sentence and a hint on standard error, status 2."""
    lines = result.err.splitlines()
    assert result.status == 2, result
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert not lines[0].endswith(".")
    assert lines[1].startswith("hint: ")
    for word in words:
        assert word in result.err, (word, result.err)


def test_inspect_prints_what_a_file_is_and_what_fits_it(run: Run, files: dict[str, Path]) -> None:
    result = run("weights", "inspect", str(files["projection"]))
    assert (result.status, result.err) == (0, "")
    assert "a MiniGPT-4 checkpoint" in result.out.splitlines()[0]
    assert "fits          a language model 12 wide" in result.out
    assert "float32" in result.out


def test_inspect_gives_the_same_as_json(run: Run, files: dict[str, Path]) -> None:
    result = run("weights", "inspect", str(files["vision"]), "--json")
    assert result.status == 0
    found = json.loads(result.out)
    assert found["kind"] == "vision encoder"
    assert found["sizes"]["width"] == 24
    assert found["path"] == str(files["vision"])


def test_inspect_refuses_what_is_nothing_known(run: Run, tmp_path: Path) -> None:
    import torch

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    result = run("weights", "inspect", "x.safetensors")
    refused(result, "x.safetensors", "its first tensor is x")
    assert result.out == ""
    refused(run("weights", "inspect", "nothing"), "does not exist")


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "it is empty"), ("\u5f20\u91cf " * 30, "it is a text"), (b"\x89PNG\r\n\x1a\n\0\0", "it is a picture")],
)
def test_inspect_says_what_other_file_it_was_given(run: Run, content: bytes | str, what: str) -> None:
    data = content.encode() if isinstance(content, str) else content
    for name in ("file.pth", "file.safetensors", "file.txt"):
        Path(name).write_bytes(data)
        refused(run("weights", "inspect", name), f"error: {name} was not opened: {what}")


def test_doctor_prints_what_the_model_needs_against_what_is_free(run: Run) -> None:
    result = run("doctor", "--no-check-weights")
    assert (result.status, result.err) == (0, "")
    for word in ("cpu: ", "language model", "cache of the conversation", "GB are free", "nano will run here"):
        assert word in result.out


def test_doctor_ends_with_two_and_the_cure_when_the_model_will_not_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [Device("cpu", "a CPU", 1_400_000_000, 2_000_000_000)])
    result = run("doctor", "--num-beams", "4")
    refused(result, "nano needs 2.1 GB", "--num-beams")
    assert "together" in result.out
    assert (result.out + result.err).count("nano needs 2.1 GB") == 1
    assert "will run here" not in result.out
    result = run("doctor", "--num-beams", "4", "--json")
    refused(result, "nano needs 2.1 GB")
    found = json.loads(result.out)
    assert found["problems"][0]["message"] in result.err


def test_doctor_says_further_problems_beside_the_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [Device("cpu", "a CPU", 1_000_000, 2_000_000_000)])
    monkeypatch.setattr(doctor, "libraries", lambda: [Library("torch", "1.0", ">=2.5", False)])
    result = run("doctor", "--no-check-weights")
    refused(result, "torch is version 1.0")
    assert "  also          nano needs" in result.out


def test_small_files_and_folders_are_never_of_0_megabytes(run: Run, home: Path) -> None:
    (home / "models/mine").mkdir(parents=True)
    files = original_files.write(home / "models")
    size = files["projection"].stat().st_size
    assert f"contents      {size / 1e3:.1f} kB on disk" in run("weights", "inspect", str(files["projection"])).out
    (home / "models/mine/config.json").write_text('{"model_type": "minigpt4"}' + " " * 2000)
    listed = run("models").out
    assert "full folder: mine, licence not stated, 2 kB" in listed
    assert " 0 MB" not in listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float8"], "float8"),
        (["--quantize", "int2"], "int2"),
        (["--device", "tpu"], "tpu"),
        (["-m", ""], "empty"),
        (["--num-beams", "0"], "num-beams"),
    ],
)
def test_doctor_refuses_options_that_make_no_sense_before_anything_loads(
    arguments: list[str], words: str, run: Run
) -> None:
    result = run("doctor", *arguments)
    refused(result, words)
    assert result.out == ""


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, minigpt4.cli.run; print({'torch', 'transformers', 'psutil'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_doctor_says_what_to_do_with_one_of_the_originals_yaml_files(run: Run) -> None:
    refused(run("doctor", "--cfg-path", "eval.yaml"), "model folders", "weights import -o DIR --cfg-path eval.yaml")
    assert "--cfg-path" not in run("doctor", "--help").out
