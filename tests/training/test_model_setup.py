"""Where a model is while it is prepared: never as a whole on a device that need not have room for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minigpt4.errors import ConfigError
from minigpt4.training import model_setup
from minigpt4.training.model_setup import prepare_model, seeing_on
from minigpt4.training.recipe import Recipe
from tests import tiny_chat
from tests.model import tiny

ELSEWHERE = torch.device("meta")
"""Stands for an accelerator: a tensor that was moved there can be told from one that was not."""


def recipe(model: Path, **changes: Any) -> Recipe:
    stage = {"name": "only", "steps": 1, "batch_size": 1, "learning_rate": 0.1}
    content = {"model": str(model), "output": model.parent / "run", "trainable": ["language_projection"]}
    return Recipe.model_validate({**content, "data": {"sources": [{"path": "none"}]}, "stages": [stage], **changes})


def process_of(processes: int) -> Any:  # noqa: ANN401  (in the place of the library's)
    return SimpleNamespace(device=ELSEWHERE, num_processes=processes, is_main_process=True)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_chat.saved(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("parallel", "processes", "where"),
    [("ddp", 2, "meta"), ("fsdp2", 1, "meta"), ("fsdp2", 2, "cpu")],
)
def test_a_model_that_will_be_spread_is_not_put_on_a_device_as_a_whole(
    parallel: str, processes: int, where: str, model_folder: Path
) -> None:
    prepared = prepare_model(recipe(model_folder, parallel=parallel), process_of(processes))

    assert {tensor.device.type for tensor in prepared.model.state_dict().values()} == {where}


@pytest.mark.parametrize("named", ["nano", "folder"])
def test_frozen_parts_have_the_bits_of_the_precision_and_what_learns_has_all(
    named: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cast at every update instead, they would take the memory and the time of both."""
    made = tiny_chat.model()
    monkeypatch.setattr(model_setup.nano, "frozen_parts", lambda _: ())
    monkeypatch.setattr(model_setup.nano, "assemble", lambda: (made, tiny_chat.tokenizer()))
    asked = (Path("nano"), {"joining_parts": "new"}) if named == "nano" else (model_folder, {})
    here = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=True)

    model = prepare_model(recipe(asked[0], precision="bf16", **asked[1]), here).model

    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16), (True, torch.float32)}
    assert {tensor.dtype for name, tensor in model.named_buffers() if "inv_freq" in name} == {torch.float32}


@pytest.mark.parametrize(("quantize", "device"), [("none", "cpu"), ("int8", "meta"), ("nf4", "meta")])
def test_fewer_bits_are_made_on_the_device(
    quantize: str, device: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not moved afterwards, so it would stay where it was loaded."""
    places: list[str] = []

    class EnoughError(Exception):
        pass

    def load(*_: object, device: str, **__: object) -> None:
        places.append(device)
        raise EnoughError

    monkeypatch.setattr(model_setup, "load", load)
    with pytest.raises(EnoughError):
        prepare_model(recipe(model_folder, quantize=quantize), process_of(1))

    assert places == [device]


def test_what_sees_pictures_is_on_the_device_meanwhile_and_unchanged_after() -> None:
    model = tiny_chat.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with seeing_on(model, ELSEWHERE):
        places = {name: tensor.device for name, tensor in model.named_parameters()}

    of_language = {name for name in places if name.startswith(("model.language_model.", "lm_head."))}
    assert {name for name, place in places.items() if place != ELSEWHERE} == of_language
    assert {"model.query_tokens", "model.language_projection.weight"}.isdisjoint(of_language)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("part", ["qformer", "query_tokens"])
def test_a_part_that_the_model_has_not_cannot_be_named_beside_one_that_learns(part: str, tmp_path: Path) -> None:
    tiny.model(qformer=False).save_pretrained(tmp_path / "model")
    tiny_chat.processor().save_pretrained(tmp_path / "model")
    here = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=True)

    with pytest.raises(ConfigError, match=f"the model has no {part} that could learn"):
        prepare_model(recipe(tmp_path / "model", trainable=["language_projection", part]), here)
