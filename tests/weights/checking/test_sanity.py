"""The check passes a language model that was trained, and names what is wrong with one that was not or was broken."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.weights import nano
from minigpt4.weights.checking.sanity import LARGEST_SHARE_OF_CHANCE, SENTENCE, check_language_model
from minigpt4.weights.parts import home as home_folder
from tests import golden, tiny_chat
from tests.model import tiny

NORM, TABLE, LAYER = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def words() -> PreTrainedTokenizerFast:
    return tiny_chat.tokenizer()


def trained(tied: bool) -> LlamaForCausalLM:
    """A tiny model that has learned the sentence by heart, as a large one knows it from elsewhere."""
    torch.manual_seed(0)
    values = {**tiny.TEXT["llama, tied" if tied else "llama"], "vocab_size": len(words()), "initializer_range": 0.05}
    values.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**values))
    ids = words()(SENTENCE, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if loss < 0.2 * math.log(len(words())):
            break
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def sane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sane")
    trained(tied=request.param).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a folder with other tensors."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_trained_model_passes(sane: Path) -> None:
    found = check_language_model(sane)
    assert found.problem == ""
    assert found.loss is not None
    assert found.loss < LARGEST_SHARE_OF_CHANCE * found.chance
    assert found.chance == pytest.approx(math.log(len(words())))
    assert found.embedding_norm is not None
    assert found.embedding_norm > 0


def test_loss_is_that_of_the_model_run_whole(sane: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(sane)
    ids = words()(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = float(model(input_ids=ids, labels=ids).loss)
    assert check_language_model(sane).loss == pytest.approx(whole, rel=1e-5)


def test_language_model_inside_a_full_folder_is_checked(sane: Path, tmp_path: Path) -> None:
    inner = LlamaForCausalLM.from_pretrained(sane)
    config = copy.deepcopy(tiny_chat.model().config)
    config.text_config, config.tie_word_embeddings = inner.config, inner.config.tie_word_embeddings
    outer: Any = MiniGPT4ForConditionalGeneration(config)
    outer.model.language_model.load_state_dict(inner.model.state_dict())
    if not config.tie_word_embeddings:
        outer.lm_head.load_state_dict(inner.lm_head.state_dict())
    outer.save_pretrained(tmp_path / "full")
    words().save_pretrained(tmp_path / "full")
    assert check_language_model(tmp_path / "full").loss == pytest.approx(check_language_model(sane).loss, rel=1e-5)


def spoil_one_number(tensors: Tensors) -> None:
    tensors[LAYER][3, 5] = math.nan


def make_one_number_infinite(tensors: Tensors) -> None:
    tensors[LAYER][0, 0] = -math.inf


def become_random(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.02


def become_a_delta(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.01


def lose_a_row(tensors: Tensors) -> None:
    tensors[TABLE] = tensors[TABLE][:-1].clone()


def shift_the_rows(tensors: Tensors) -> None:
    tensors[TABLE] = tensors[TABLE].roll(1, dims=0)


def empty_the_table(tensors: Tensors) -> None:
    tensors[TABLE][100:] = 0


def lose_a_tensor(tensors: Tensors) -> None:
    del tensors[LAYER]


@pytest.mark.parametrize(
    ("change", "phrase", "cure"),
    [
        (spoil_one_number, f"1 of the {64 * 64} numbers of tensor {LAYER}", "verify"),
        (make_one_number_infinite, f"numbers of tensor {LAYER}", "verify"),
        (become_random, "does not know English", "random"),
        (become_a_delta, "this is a delta", "apply-delta"),
        (lose_a_row, "rows, and the configuration says", "verify"),
        (shift_the_rows, "does not know English", "half merged"),
        (empty_the_table, "are zero", "verify"),
        (lose_a_tensor, f"tensor {LAYER} is missing", "verify"),
    ],
)
def test_broken_weights_are_told_with_a_cure(
    change: Callable[[Tensors], object], phrase: str, cure: str, sane: Path, tmp_path: Path
) -> None:
    found = check_language_model(changed(sane, tmp_path / "broken", change))
    assert phrase in found.problem
    assert not found.problem.endswith(".")
    assert cure in found.hint


def test_row_too_few_in_both_the_table_and_the_configuration_is_seen_by_the_tokenizer(tmp_path: Path) -> None:
    values = {key: value for key, value in tiny.TEXT["llama"].items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**{**values, "vocab_size": len(words()) - 1})).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    found = check_language_model(tmp_path)
    assert f"the tokenizer has {len(words())} words" in found.problem
    assert "32001" in found.hint


@pytest.mark.parametrize("name", ["delta_v0", "delta_v1.1"])
def test_golden_deltas_fail_as_deltas(name: str) -> None:
    assert "this is a delta" in check_language_model(golden.recorded(f"delta/{name}")).problem


def test_random_weights_of_the_originals_format_fail() -> None:
    assert "does not know English" in check_language_model(golden.recorded("delta/base")).problem


def test_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a model folder"):
        check_language_model(tmp_path)


@pytest.mark.slow
@pytest.mark.network
def test_nanos_own_language_model_passes() -> None:
    nano.frozen_parts()
    found = check_language_model(home_folder() / "models" / f"language-model-{nano.version()}")
    assert found.problem == ""
    assert found.loss == pytest.approx(2.18, abs=0.1)
