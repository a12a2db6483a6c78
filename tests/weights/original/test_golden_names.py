"""Every name, shape and epsilon that the original's own modules reported has its counterpart here, and no other.

Names and shapes are equal; an epsilon is equal to the last digit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt4
from minigpt4.weights.original.exporting import export_original
from minigpt4.weights.original.importing import Imported, import_original
from minigpt4.weights.original.names import STATE_DICT_NAMES, Kind, OriginalFiles, to_original, to_ours, why_ignored
from tests import golden
from tests.weights.original.test_golden_import import files, imported, settings

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return golden.content("golden/state_dict_keys.json")


def planned(**changes: Path | None) -> Imported:
    """What an import would do with other files than the usual."""
    given = OriginalFiles(**{**vars(files()), **changes})
    return import_original(Path("unused"), given, overrides=settings(), dry_run=True)


def ignored_of(made: Imported, path: Path) -> set[str]:
    return {name for of, name, _ in made.plan.ignored if of == path}


def test_whole_state_dict_has_the_originals_names_and_shapes(recorded: dict[str, Any]) -> None:
    shapes = planned().plan.shapes
    told: dict[str, tuple[int, ...]] = {}
    for name, (shape, _) in recorded["full_state_dict_keys"].items():
        if why_ignored(Kind.CHECKPOINT, name):
            assert name.endswith(("position_ids", "inv_freq")), name  # buffers, which follow from the configuration
            continue
        target = to_ours(Kind.CHECKPOINT, name)
        assert target is not None, name
        # The query's and the value's bias are two thirds of one here.
        told[target.name] = tuple(shape) if target.third is None else (3 * shape[0],)
        assert (name, target.third) in to_original(STATE_DICT_NAMES, target.name)
    assert told == shapes


def test_what_the_vision_file_holds_too_much_is_left_out(recorded: dict[str, Any]) -> None:
    assert recorded["vit_file"]["missing"] == []
    made = planned()
    assert ignored_of(made, files().vision) == set(recorded["vit_file"]["unexpected"])


def test_what_the_qformers_file_lacks_is_new_and_what_it_holds_too_much_is_left_out(recorded: dict[str, Any]) -> None:
    made = planned(projection=None)
    new = {name for name in made.plan.shapes if name not in made.plan.parts}
    assert new == {to_ours(Kind.CHECKPOINT, name).name for name in recorded["blip2_file"]["missing"]}  # type: ignore[union-attr]
    qformer = files().qformer
    assert qformer is not None
    buffers = {"Qformer.bert.embeddings.position_ids"}
    assert ignored_of(made, qformer) - buffers == set(recorded["blip2_file"]["unexpected"])


def test_what_an_older_qformers_file_holds_too_much_is_left_out(recorded: dict[str, Any]) -> None:
    path = golden.recorded("weights/blip2_with_text_side_keys.pth")
    left_out = ignored_of(planned(qformer=path), path)
    assert set(recorded["blip2_text_side_file"]["unexpected"]) <= left_out
    # The rest fits no module that the original keeps.
    assert not left_out & (set(recorded["full_state_dict_keys"]) - {"Qformer.bert.embeddings.position_ids"})


def test_a_checkpoints_tensors_are_the_projection_and_buffers(recorded: dict[str, Any]) -> None:
    path = files().projection
    assert path is not None
    made = planned()
    used = {part.name for parts in made.plan.parts.values() for part in parts if part.source.path == path}
    keys = set(recorded["minigpt4_ckpt"]["keys"])
    assert recorded["minigpt4_ckpt"]["unexpected"] == []
    assert used == {"llama_proj.weight", "llama_proj.bias"}
    assert used | ignored_of(made, path) == keys


def test_exported_files_have_the_originals_names_alone(recorded: dict[str, Any], tmp_path: Path) -> None:
    export_original(imported(tmp_path / "model"), tmp_path / "out")
    full = {name: tuple(shape) for name, (shape, _) in recorded["full_state_dict_keys"].items()}
    prefixes = {"eva_vit_g.pth": "visual_encoder.", "blip2_pretrained_flant5xxl.pth": "", "pretrained_minigpt4.pth": ""}
    written: dict[str, tuple[int, ...]] = {}
    for file, prefix in prefixes.items():
        content = torch.load(tmp_path / "out" / file, weights_only=True)
        content = content.get("model", content)
        written |= {prefix + name: tuple(tensor.shape) for name, tensor in content.items()}
    for path in (tmp_path / "out/language-model").glob("*.bin"):
        content = torch.load(path, weights_only=True)
        written |= {f"llama_model.{name}": tuple(tensor.shape) for name, tensor in content.items()}
    lacking = {name for name in full if name not in written}
    assert all(name.endswith(("position_ids", "inv_freq")) for name in lacking)
    depth = golden.content("configs/tiny_dims.json")["vit"]["depth"]
    beyond = {name for name in written if name not in full}
    # A mark that says how many blocks are used, where the file does not end in one that is not.
    assert all(name.startswith((f"visual_encoder.blocks.{depth}.", "visual_encoder.minigpt4_")) for name in beyond)
    assert all(written[name] == full[name] for name in written.keys() & full.keys())


def test_every_norm_has_the_originals_epsilon(tmp_path: Path) -> None:
    model, _ = minigpt4.load(imported(tmp_path / "model"), device="cpu")
    recorded = json.loads((golden.ROOT / "golden/eps_probe.json").read_text(encoding="utf-8"))["eps"]
    epsilons = {}
    for name in recorded:
        target = to_ours(Kind.CHECKPOINT, f"{name}.weight")
        assert target is not None, name
        module: Any = model.get_submodule(target.name.removesuffix(".weight"))
        epsilons[name] = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    assert epsilons == recorded
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    assert len(norms) == len(recorded)
