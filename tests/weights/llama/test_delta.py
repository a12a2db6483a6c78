"""Deltas are added and made, bit for bit, in any layout, and interrupted runs go on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.files.tensor_files import open_tensors
from minigpt4.weights.llama.delta import Result, apply_delta, make_delta
from tests.weights.llama.delta_files import (
    FREQUENCIES,
    GOLDEN,
    LAYOUTS,
    ROWS,
    naive_sum,
    present,
    tiny_delta,
    tiny_llama,
    write_folder,
)


def read(folder: Path) -> dict[str, Tensor]:
    tensors = open_tensors(folder)
    return {name: tensors.read(name).clone() for name in tensors}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (name, actual[name].dtype) == (name, tensor.dtype)
        assert torch.equal(actual[name], tensor), name


def pair(folder: Path, *, rows: int = ROWS) -> tuple[Path, Path]:
    """A base and a delta for it, each in three files."""
    base = write_folder(folder / "base", tiny_llama(1), shards=3)
    return base, write_folder(folder / "delta", tiny_delta(2, rows=rows), shards=3)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("delta", "expected"),
    [("delta_v0", "expected_v0"), ("delta_v1.1", "expected_v1.1"), ("delta_v1.1", "expected_v1.1_low_cpu_mem")],
)
def test_merge_equals_what_the_original_tools_wrote(
    delta: str, expected: str, file_format: str, tmp_path: Path
) -> None:
    apply_delta(GOLDEN / "base", GOLDEN / delta, tmp_path / "out", file_format=file_format)  # type: ignore[arg-type]

    actual, wanted = read(tmp_path / "out"), read(GOLDEN / expected)
    if not expected.endswith("low_cpu_mem"):  # that one keeps the base's frequencies; the other rounds them
        rounded = {name: tensor.half().float() for name, tensor in actual.items() if name.endswith("inv_freq")}
        actual |= rounded
    assert_same(actual, wanted)


@pytest.mark.parametrize(("delta", "version", "rows"), [("delta_v0", "v0", 401), ("delta_v1.1", "v1.1", 400)])
def test_version_is_told_and_small_files_are_the_deltas(delta: str, version: str, rows: int, tmp_path: Path) -> None:
    result = apply_delta(GOLDEN / "base", GOLDEN / delta, tmp_path / "out")

    assert (result.version, result.template) == (version, "vicuna-v0" if version == "v0" else None)
    assert f"the delta is {version}: {rows} rows" in result.notes[0]
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["vocab_size"] == rows
    for name in ("tokenizer.model", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (GOLDEN / delta / name).read_bytes()
    assert "generation_config.json" in verify_folder(tmp_path / "out").files


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_merged_folder_is_loaded_by_transformers(file_format: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    apply_delta(GOLDEN / "base", GOLDEN / "delta_v0", tmp_path / "out", file_format=file_format)  # type: ignore[arg-type]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)

    assert torch.equal(model.lm_head.weight, read(GOLDEN / "expected_v0")["lm_head.weight"])


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_of_shards_gives_the_naive_sum(seed: int, tmp_path: Path) -> None:
    chosen = random.Random(seed)
    rows = chosen.choice([ROWS, ROWS + 1])
    sides = {"base": tiny_llama(seed), "delta": tiny_delta(seed + 100, rows=rows)}
    for name, tensors in sides.items():
        layout, shards = chosen.choice(LAYOUTS), chosen.randint(1, 6)
        write_folder(
            tmp_path / name,
            tensors,
            layout=layout,
            shards=shards,
            index=chosen.random() < 0.5,
            seed=chosen.randrange(1000),
        )
    shard_bytes, file_format = chosen.choice([200, 3000, 2**30]), chosen.choice(["safetensors", "bin"])

    apply_delta(
        tmp_path / "base",
        tmp_path / "delta",
        tmp_path / "out",
        shard_bytes=shard_bytes,
        file_format=file_format,  # type: ignore[arg-type]
    )

    assert_same(read(tmp_path / "out"), naive_sum(sides["base"], sides["delta"]))


def test_merging_loads_no_library_but_torch() -> None:
    code = "import sys, minigpt4.weights.llama.delta, minigpt4.weights.llama.meta; print('transformers' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"  # it alone takes 100 MB


def test_tensor_of_many_pieces_is_added_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "minigpt4.weights.llama.delta.PIECE_BYTES", 36
    )  # 18 numbers: neither rows nor tensors end there
    base, delta = pair(tmp_path, rows=ROWS + 1)

    apply_delta(base, delta, tmp_path / "out")

    assert_same(read(tmp_path / "out"), naive_sum(tiny_llama(1), tiny_delta(2, rows=ROWS + 1)))


@pytest.mark.parametrize("rows", [ROWS, ROWS + 1])
def test_delta_made_here_turns_the_base_into_the_model(rows: int, tmp_path: Path) -> None:
    step = 2**-8  # numbers whose sums and differences float16 holds exactly
    base = {name: (tensor / step).round().mul(step) for name, tensor in tiny_llama(1).items()}
    model = {name: (tensor / step).round().mul(step) for name, tensor in tiny_llama(2, rows=rows).items()}
    write_folder(tmp_path / "base", base, shards=2)
    write_folder(tmp_path / "model", model, layout="safetensors")

    made = make_delta(tmp_path / "base", tmp_path / "model", tmp_path / "delta", file_format="bin")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out", trust=True)

    assert made.version == ("v0" if rows > ROWS else "v1.1")
    assert_same(read(tmp_path / "out"), model)


def test_frequencies_come_from_the_base_alone(tmp_path: Path) -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    base = write_folder(tmp_path / "base", tiny_llama(1) | {FREQUENCIES: frequencies})
    delta = write_folder(tmp_path / "delta", tiny_delta(2))  # the original's tool would double them

    apply_delta(base, delta, tmp_path / "out")

    assert torch.equal(read(tmp_path / "out")[FREQUENCIES], frequencies)


def test_both_sides_are_rounded_before_they_are_added_where_a_type_is_asked_for(tmp_path: Path) -> None:
    base = {name: tensor.float() + 1e-5 for name, tensor in tiny_llama(1).items()}
    write_folder(tmp_path / "base", base, layout="safetensors")
    delta = write_folder(tmp_path / "delta", tiny_delta(2))

    apply_delta(tmp_path / "base", delta, tmp_path / "out", dtype="float16")

    rounded = {name: tensor.half() for name, tensor in base.items()}
    assert_same(read(tmp_path / "out"), naive_sum(rounded, tiny_delta(2)))


def test_old_tokenizer_and_swapped_ids_are_mended_with_a_line_each(tmp_path: Path) -> None:
    base, delta = pair(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (delta / name).write_bytes((GOLDEN / "delta_v0" / name).read_bytes())
    (delta / "tokenizer.json").unlink()
    config = json.loads((delta / "tokenizer_config.json").read_bytes()) | {"tokenizer_class": "LLaMATokenizer"}
    (delta / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    config = json.loads((delta / "config.json").read_bytes()) | {"bos_token_id": 0, "eos_token_id": 1}
    (delta / "config.json").write_text(json.dumps(config), encoding="utf-8")

    notes = "\n".join(apply_delta(base, delta, tmp_path / "out").notes)

    for mended in ("LLaMATokenizer", "special_tokens_map.json", "bos_token_id 0 and eos_token_id 1"):
        assert mended in notes
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())["tokenizer_class"] == "LlamaTokenizer"
    assert (tmp_path / "out" / "special_tokens_map.json").is_file()


def in_child(work: Callable[[], object]) -> int:
    """Run something in a child of this process; return what it ended with."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except StorageError as error:
            os._exit(3 if "are kept" in error.hint else 4)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def merge(folder: Path, report: Callable[[str, int, int], None] | None = None) -> Result:
    return apply_delta(folder / "base", folder / "delta", folder / "out", shard_bytes=3000, report=report)


def test_killed_after_any_file_the_next_run_goes_on(tmp_path: Path) -> None:
    pair(tmp_path)
    expected = naive_sum(tiny_llama(1), tiny_delta(2))
    for number in (1, 2, 3):
        calls = 0

        def die(what: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023  (the call ends within the turn)
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(lambda: merge(tmp_path, die)) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()

    result = merge(tmp_path)

    assert result.kept == 3
    assert_same(read(tmp_path / "out"), expected)
    assert present(tmp_path)[0] == "base"  # nothing hidden is left
    verify_folder(tmp_path / "out")


def test_full_disk_leaves_no_target_and_the_next_run_goes_on(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", tiny_llama(1))
    write_folder(tmp_path / "delta", tiny_delta(2))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2200, 2200))  # some of the files fit with their headers
        apply_delta(base, tmp_path / "delta", tmp_path / "out", shard_bytes=2000)

    assert in_child(limited) == 3  # the hint says that files are kept
    assert not (tmp_path / "out").exists()

    result = apply_delta(base, tmp_path / "delta", tmp_path / "out", shard_bytes=2000)

    assert result.kept > 0
    assert_same(read(tmp_path / "out"), naive_sum(tiny_llama(1), tiny_delta(2)))


def interrupted(folder: Path) -> Path:
    """Stop a merge after its second file; return where the files are."""

    def stop(what: str, done: int, total: int) -> None:
        if done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(folder, stop)
    return folder / ".out.partial" / "content"


def test_damaged_file_of_an_interrupted_run_is_made_anew(tmp_path: Path) -> None:
    pair(tmp_path)
    content = interrupted(tmp_path)
    files = sorted(content.iterdir())
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)

    result = merge(tmp_path)

    assert result.kept == len(files) - 1
    assert_same(read(tmp_path / "out"), naive_sum(tiny_llama(1), tiny_delta(2)))


def test_files_of_an_interrupted_run_are_not_used_for_other_inputs(tmp_path: Path) -> None:
    pair(tmp_path)
    interrupted(tmp_path)
    for path in (tmp_path / "delta").iterdir():
        path.unlink()
    (tmp_path / "delta").rmdir()
    write_folder(tmp_path / "delta", tiny_delta(3), shards=3)

    result = merge(tmp_path)

    assert result.kept == 0
    assert_same(read(tmp_path / "out"), naive_sum(tiny_llama(1), tiny_delta(3)))


def test_sum_that_is_not_finite_is_an_error_and_leaves_no_target(tmp_path: Path) -> None:
    base, delta = tiny_llama(1), tiny_delta(2)
    name = "model.layers.1.mlp.up_proj.weight"
    base[name][3, 3] = delta[name][3, 3] = 60000.0  # together more than float16 holds
    write_folder(tmp_path / "base", base)
    write_folder(tmp_path / "delta", delta)

    with pytest.raises(WeightsError, match=f"the tensor {name} would hold numbers that are not finite"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out", trust=True)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_any_flipped_bit_and_any_cut_of_a_merged_folder_is_detected(file_format: str, tmp_path: Path) -> None:
    base, delta = pair(tmp_path)
    out = tmp_path / "out"
    apply_delta(base, delta, out, file_format=file_format, shard_bytes=3000)  # type: ignore[arg-type]
    chosen = random.Random(0)
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        flips = [(chosen.randrange(len(whole)), chosen.randrange(8)) for _ in range(8)]
        mutants = [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :] for place, bit in flips]
        mutants += [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 1)]
        for mutant in mutants:
            path.write_bytes(mutant)

            if path.name == "manifest.json":
                try:
                    verify_folder(out)
                except WeightsError:
                    continue
                assert json.loads(mutant) == json.loads(whole) or mutant.split() == whole.split()
            else:
                with pytest.raises(WeightsError, match=path.name):
                    verify_folder(out)
        path.write_bytes(whole)
    verify_folder(out)
