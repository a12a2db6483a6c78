"""Every run of the original's merging tools that was recorded, and what ours makes of the same folders.

What a tool wrote is equal bit for bit, files beside the weights included. Where one failed on folders that belong
together, or wrote a wrong model without a word, ours merges them rightly or refuses them with a sentence.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.llama.delta import apply_delta
from tests import golden
from tests.weights.llama.test_delta import assert_same, read

pytestmark = pytest.mark.reference
INV_FREQ = "rotary_emb.inv_freq"
MISSING = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return golden.content("golden/delta_merge.json")


def assert_expected(out: Path, expected: Path) -> None:
    """The tensors of a recorded result; the frequencies are the base's own, which one of its ways rounds first."""
    actual, wanted = read(out), read(expected)
    for name in [name for name in wanted if name.endswith(INV_FREQ)]:
        if torch.equal(wanted[name], actual[name].half().float()):
            actual[name] = wanted[name]
    assert_same(actual, wanted)


def files_beside_weights(folder: Path) -> dict[str, Any]:
    """The small files, as content: configurations without the name of the folder they came from."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".json" and "index" not in path.name and path.name != "manifest.json":
            found[path.name] = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "config.json":
                found[path.name].pop("_name_or_path", None)
        elif path.name == "tokenizer.model":
            found[path.name] = path.read_bytes()
    return found


def with_tensors(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a folder with other tensors, in one file without an index."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    tensors = read(source)
    change(tensors)
    torch.save(tensors, target / "pytorch_model.bin")
    return target


def without(*endings: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return drop


@pytest.mark.parametrize(
    ("case", "delta"),
    [
        ("v0.1.10 apply_delta, delta_v0 (vocab+1)", "delta_v0"),
        ("v0.2.5 apply_delta, delta_v1.1 (same vocab)", "delta_v1.1"),
        ("v0.2.5 apply_delta_low_cpu_mem, delta_v1.1", "delta_v1.1"),
    ],
)
def test_files_beside_the_weights_are_those_of_the_original_tool(
    case: str, delta: str, recorded: dict[str, Any], tmp_path: Path
) -> None:
    folder, run = golden.ROOT / "delta", recorded[case]
    assert run["result"] == "ok"
    apply_delta(folder / "base", folder / delta, tmp_path / "out", file_format="bin")
    written = files_beside_weights(tmp_path / "out")
    weights = {name for name in run["files"] if name.startswith("pytorch_model")}
    assert set(run["files"]) - weights <= set(written)
    for name, content in files_beside_weights(folder / run["folder"]).items():
        assert written[name] == content, name
    for name, content in recorded["tokenizer_files"].get(run["folder"], {}).items():
        assert written[name] == content, name


def test_tokenizer_that_is_saved_is_the_deltas_as_the_first_and_the_last_tool_did(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    assert recorded["which_tokenizer_is_saved"] == {
        "v0.1.10": "delta", "v0.2.0": "base", "v0.2.3": "base", "v0.2.5": "delta",
    }  # fmt: skip
    folder = golden.ROOT / "delta"
    base = shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 7}), encoding="utf-8")
    apply_delta(base, folder / "delta_v1.1", tmp_path / "out")
    for name in recorded["tokenizer_files"]["delta_v1.1"]:
        written, own = ((of / name).read_bytes() for of in (tmp_path / "out", folder / "delta_v1.1"))
        assert written == own, name


@pytest.mark.parametrize("delta", ["delta_v0", "delta_v1.1"])
def test_old_class_name_in_the_base_stops_no_merge(delta: str, recorded: dict[str, Any], tmp_path: Path) -> None:
    failed = recorded["BASE tokenizer_class LLaMATokenizer, v0.1.10, delta_v0"]
    assert "LLaMATokenizer does not exist" in failed["error"]
    base = shutil.copytree(golden.ROOT / "delta/base", tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("LlamaTokenizer", "LLaMATokenizer"), encoding="utf-8")
    apply_delta(base, golden.ROOT / "delta" / delta, tmp_path / "out")
    assert_expected(tmp_path / "out", golden.ROOT / "delta" / delta.replace("delta", "expected"))
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["tokenizer_class"] == "LlamaTokenizer"


def test_delta_that_lacks_a_tensor_is_refused_by_its_name_before_anything_is_written(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    runs = [run for name, run in recorded.items() if name.startswith(f"DELTA missing {MISSING}")]
    assert [run["result"] for run in runs] == ["ok", "error"]  # one filled it with random numbers, one stopped midway
    delta = with_tensors(golden.ROOT / "delta/delta_v1.1", tmp_path / "delta", without(MISSING))
    with pytest.raises(WeightsError, match=re.escape(f"lacks the tensor {MISSING}")):
        apply_delta(golden.ROOT / "delta/base", delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_delta_without_frequencies_leaves_the_bases_as_they_are(recorded: dict[str, Any], tmp_path: Path) -> None:
    doubled = recorded["DELTA without inv_freq keys, v0.2.5 apply_delta"]["inv_freq_in_result"]
    delta = with_tensors(golden.ROOT / "delta/delta_v1.1", tmp_path / "delta", without(INV_FREQ))
    apply_delta(golden.ROOT / "delta/base", delta, tmp_path / "out")
    assert_expected(tmp_path / "out", golden.ROOT / "delta/expected_v1.1_low_cpu_mem")
    written = read(tmp_path / "out")[f"model.layers.0.self_attn.{INV_FREQ}"]
    torch.testing.assert_close(2 * written, torch.tensor(doubled), rtol=1e-3, atol=0)  # theirs was rounded, too


def test_base_in_a_single_file_is_merged_where_the_original_wrote_no_weights(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    run = recorded["v0.2.5 apply_delta_low_cpu_mem onto a single-file base (pytorch_model.bin)"]
    assert not any(name.endswith(".bin") for name in run["files"])
    base = with_tensors(golden.ROOT / "delta/base", tmp_path / "base", lambda tensors: None)
    apply_delta(base, golden.ROOT / "delta/delta_v1.1", tmp_path / "out")
    assert_expected(tmp_path / "out", golden.ROOT / "delta/expected_v1.1_low_cpu_mem")
