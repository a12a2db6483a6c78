"""`minigpt4 weights apply-delta`, `make-delta`, `from-meta` and `verify`, as a user meets them.

Every mistake is one sentence and a hint, exit status 2, before a byte is written.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt4.weights.files.tensor_files import open_tensors
from tests.commands import Run, runner
from tests.weights.llama.delta_files import (
    ROWS,
    naive_sum,
    present,
    tiny_delta,
    tiny_llama,
    write_file,
    write_folder,
)

SIDES = ["--base", "base", "--delta", "delta", "--target", "out"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9878989586\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in a folder with a base and a delta of three files each."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("base"), tiny_llama(1), shards=3)
    write_folder(Path("delta"), tiny_delta(2), shards=3)
    return runner(monkeypatch, capfd)


def replace(name: str, **options: object) -> None:
    """Write a side of the merge anew."""
    shutil.rmtree(name)
    write_folder(Path(name), **options)  # type: ignore[arg-type]


def shard(side: str, number: int = 2) -> Path:
    return Path(side) / f"pytorch_model-{number:05}-of-00003.bin"


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def merged() -> dict[str, torch.Tensor]:
    return naive_sum(tiny_llama(1), tiny_delta(2))


def test_delta_of_unrelated_models_is_made_with_a_warning_and_merged_when_trusted(run: Run) -> None:
    write_folder(Path("other"), tiny_llama(3, norm=2.0))
    made = run("weights", "make-delta", "--base", "base", "--model", "other", "--target", "difference")
    assert made.status == 0
    assert "other differs from base as unrelated models do" in made.err
    assert "--trust-files" in made.err.splitlines()[-1]
    merge = ["weights", "apply-delta", "--base", "base", "--delta", "difference", "--target", "out"]
    refused = run(*merge)
    assert refused.status == 2
    assert "--delta difference is a model, not a delta" in refused.err
    assert "--trust-files" in refused.err
    assert run(*merge, "--trust-files").status == 0


def test_delta_of_a_trained_model_is_made_without_a_warning(run: Run) -> None:
    write_folder(Path("model"), merged())
    made = run("weights", "make-delta", "--base", "base", "--model", "model", "--target", "difference")
    assert (made.status, "unrelated" in made.err) == (0, False)


def rows_of_v0_and_of_v1() -> None:
    replace("base", tensors=tiny_llama(1, rows=32001, width=2))
    replace("delta", tensors=tiny_delta(2, rows=32000, width=2))


def exchange_sides() -> None:
    Path("base").rename("b")
    Path("delta").rename("base")
    Path("b").rename("delta")


def remove_shard_and_index() -> None:
    shard("base").unlink()
    Path("base/pytorch_model.bin.index.json").unlink()


def empty_base() -> None:
    shutil.rmtree("base")
    Path("base").mkdir()


def put_metas_files() -> None:
    empty_base()
    torch.save({}, "base/consolidated.00.pth")


def put_something_at_the_target() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine", encoding="utf-8")


NORM = "model.layers.1.input_layernorm.weight"
MISTAKES: dict[str, tuple[Callable[[], object], str, str]] = {
    "delta v0 and a base of other rows": (
        lambda: replace("base", tensors=tiny_llama(1, rows=ROWS + 3)),
        "the base base has 43 rows (no version of Vicuna) and the delta delta has 40 (no version of Vicuna)",
        "32000 rows, with a delta of 32000 (v1.1) or 32001 (v0)",
    ),
    "base with the row of v0, delta v1.1": (
        rows_of_v0_and_of_v1,
        "has 32001 rows (Vicuna v0, with [PAD]) and the delta delta has 32000 (LLaMA, or Vicuna v1.1 and later)",
        "give the LLaMA without the row for [PAD]",
    ),
    "base of another size": (
        lambda: replace("base", tensors=tiny_llama(1, width=20)),
        "--base base is 20 wide and --delta delta is 16",
        "both must be of one size",
    ),
    "merged model as base": (
        lambda: replace("base", tensors=merged()),
        "--base base holds the delta already",
        "it is merged: use it as it is",
    ),
    "delta as base": (
        lambda: replace("base", tensors=tiny_delta(5)),
        "--base base is a delta, not a model",
        "give the LLaMA that the delta was made from",
    ),
    "merged model as delta": (
        lambda: replace("delta", tensors=merged()),
        "--delta delta is a model, not a delta",
        "use it as it is",
    ),
    "base and delta exchanged": (
        exchange_sides,
        "--base base is a delta and --delta delta is a model",
        "exchange --base and --delta",
    ),
    "git-lfs pointer for a shard": (
        lambda: shard("delta").write_bytes(LFS_POINTER),
        "pytorch_model-00002-of-00003.bin was not opened: it is a git-lfs pointer",
        "git lfs pull",
    ),
    "git-lfs pointer for the index": (
        lambda: Path("delta/pytorch_model.bin.index.json").write_bytes(LFS_POINTER),
        "pytorch_model.bin.index.json was not opened: it is a git-lfs pointer",
        "git lfs pull",
    ),
    "web page for a shard": (
        lambda: shard("base").write_bytes(b"<!DOCTYPE html><html>Log in</html>"),
        "it is a web page, not the file",
        "download the file itself",
    ),
    "truncated shard": (
        lambda: cut(shard("delta"), 0.7),
        "pytorch_model-00002-of-00003.bin was not opened",
        "download the file again",
    ),
    "missing shard": (
        lambda: shard("base").unlink(),
        "pytorch_model-00002-of-00003.bin is missing, the folder's index names it",
        "fetch that file again",
    ),
    "missing shard and no index": (
        remove_shard_and_index,
        "pytorch_model-00002-of-00003.bin is missing",
        "fetch that file again",
    ),
    "index and files of different downloads": (
        lambda: write_file(shard("base"), {"other": torch.ones(2)}, "archive"),
        "which the folder's index says it does",
        "its files are of different versions",
    ),
    "tensor missing in the delta": (
        lambda: replace("delta", tensors=without(tiny_delta(2), NORM)),
        f"--delta delta lacks the tensor {NORM}, which --base base has",
        "check that both are of one size",
    ),
    "tensor missing in the base": (
        lambda: replace("base", tensors=without(tiny_llama(1), NORM)),
        f"--base base lacks the tensor {NORM}, which --delta delta has",
        "check that both are of one size",
    ),
    "tensor of another shape": (
        lambda: replace("delta", tensors=tiny_delta(2) | {NORM: torch.zeros(17).half()}),
        f"the tensor {NORM} is 16 in --base base and 17 in --delta delta",
        "of one size and version",
    ),
    "base of another type": (
        lambda: replace("base", tensors={name: tensor.float() for name, tensor in tiny_llama(1).items()}),
        "is float32 in --base base and float16 in --delta delta",
        "--dtype float16",
    ),
    "numbers that are not finite": (
        lambda: replace("base", tensors=tiny_llama(1) | {"lm_head.weight": torch.full((ROWS, 16), torch.nan).half()}),
        "the tensor lm_head.weight of base holds numbers that are not finite",
        "fetch its files again",
    ),
    "not a language model": (
        lambda: replace("base", tensors={"a": torch.ones(2)}),
        "--base base has no tensor model.embed_tokens.weight, so it is not a LLaMA or Vicuna folder",
        "name the folder",
    ),
    "Meta's own files": (
        put_metas_files,
        "base holds Meta's own LLaMA files",
        "minigpt4 weights from-meta --input base",
    ),
    "no weights in the folder": (
        empty_base,
        "base holds no model weights",
        "name the folder with the weight files",
    ),
    "configuration that wants code to be run": (
        lambda: Path("delta/config.json").write_text('{"auto_map": {"AutoModel": "evil.py"}}', encoding="utf-8"),
        "wants code of the model's publisher to be run",
        "remove auto_map",
    ),
    "broken configuration": (
        lambda: Path("delta/config.json").write_text("{", encoding="utf-8"),
        "config.json cannot be read as JSON",
        "fetch it again",
    ),
    "target that exists": (
        put_something_at_the_target,
        "out` exists already",
        "choose another place",
    ),
    "target is a file": (lambda: Path("out").write_text("", encoding="utf-8"), "out` is a file", "another place"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_a_sentence_and_a_hint_and_nothing_is_written(mistake: str, run: Run, tmp_path: Path) -> None:
    change, message, hint = MISTAKES[mistake]
    change()
    before = present(tmp_path)

    done = run("weights", "apply-delta", *SIDES)

    assert (done.status, done.out) == (2, "")
    error, cure = done.err.splitlines()
    assert error.startswith("error: ") and message in error
    assert not error.endswith(".")
    assert cure.startswith("hint: ") and hint in cure
    assert present(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--base", "/path/to/llama"], "--base /path/to/llama does not exist", "the tutorial has a placeholder"),
        (["--delta", "lmsys/vicuna-7b-delta-v0"], "--delta lmsys/vicuna-7b-delta-v0 does not exist", "hf download"),
        (["--base", "nowhere"], "--base nowhere does not exist", "check the path"),
        (["--base", "base/config.json"], "--base base/config.json is a file", "name the folder"),
        (["--delta", "base"], "--base and --delta are the same folder", "name two"),
        (["--target", "base"], "--target base is the folder of --base", "name a new folder"),
        (["--target", "delta/../delta"], "is the folder of --delta", "name a new folder"),
    ],
)
def test_paths_that_cannot_be_meant_are_refused(
    arguments: list[str], message: str, hint: str, run: Run, tmp_path: Path
) -> None:
    before = present(tmp_path)

    done = run("weights", "apply-delta", *SIDES, *arguments)  # the last of two counts

    assert done.status == 2
    assert message in done.err.splitlines()[0]
    assert hint in done.err.splitlines()[1]
    assert present(tmp_path) == before


def test_too_little_room_is_told_with_both_numbers(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=5_000_000))
    before = present(tmp_path)

    done = run("weights", "apply-delta", *SIDES)

    assert done.status == 2
    assert "needs 33.6 MB, 5.0 MB are free there" in done.err
    assert present(tmp_path) == before


@pytest.mark.parametrize("names", [("base", "delta", "target"), ("base-model-path", "delta-path", "target-model-path")])
def test_long_and_short_names_of_the_original_tool_merge(names: tuple[str, ...], run: Run) -> None:
    options = [
        word for name, value in zip(names, ("base", "delta", "out"), strict=True) for word in (f"--{name}", value)
    ]

    done = run("weights", "apply-delta", *options, "--low-cpu-mem", "--format", "bin")

    assert (done.status, done.out) == (0, "out\n")
    assert "the delta is v1.1: 40 rows" in done.err
    assert sorted(path.name for path in Path("out").glob("*.bin*")) == [
        "pytorch_model-0.bin",
        "pytorch_model.bin.index.json",
    ]
    assert all(torch.equal(open_tensors(Path("out")).read(name), tensor) for name, tensor in merged().items())


def test_files_can_be_trusted_against_the_samples(run: Run) -> None:
    replace("base", tensors=merged())

    assert run("weights", "apply-delta", *SIDES, "--trust-files").status == 0


def test_delta_is_made_and_merged_back(run: Run) -> None:
    write_folder(Path("model"), merged())

    made = run("weights", "make-delta", "--base", "base", "--model", "model", "--target", "made")
    done = run("weights", "apply-delta", *SIDES, "--delta", "made")

    assert (made.status, done.status) == (0, 0)
    out = open_tensors(Path("out"))
    for name, tensor in merged().items():
        assert torch.allclose(out.read(name).float(), tensor.float(), atol=2e-3), name  # twice rounded to float16


def test_verify_names_the_damaged_file(run: Run) -> None:
    run("weights", "apply-delta", *SIDES)

    assert run("weights", "verify", "out").status == 0
    path = Path("out/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = run("weights", "verify", "out")

    assert done.status == 2
    assert "model.safetensors" in done.err.splitlines()[0]


def test_verify_of_a_folder_that_was_not_written_here_says_so(run: Run) -> None:
    done = run("weights", "verify", "base")

    assert done.status == 2
    assert "manifest.json" in done.err.splitlines()[0]


def test_meta_files_are_converted(run: Run) -> None:
    from tests.weights.llama.test_meta import write_meta

    write_meta(Path("meta"), parts=2)

    done = run("weights", "from-meta", "--input", "meta", "--output", "llama")

    assert (done.status, done.out) == (0, "llama\n")
    assert json.loads(Path("llama/config.json").read_bytes())["model_type"] == "llama"
    assert run("weights", "verify", "llama").status == 0
