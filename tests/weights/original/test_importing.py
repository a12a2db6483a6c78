"""Importing small files of the original's make: what comes out, what is refused, and that nothing is left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minigpt4
from minigpt4.errors import MiniGPT4Error, PromptError, StorageError, WeightsError
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.original.exporting import export_original
from minigpt4.weights.original.importing import import_original, interpolated_positions
from minigpt4.weights.original.names import OriginalFiles
from tests.weights.original import original_files
from tests.weights.original.original_files import SMALL

HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]
LAYERS = "model.vision_model.encoder.layers"


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    return original_files.write(tmp_path)


def run(tmp_path: Path, parts: dict[str, Path], *overrides: str, **options: Any) -> Path:
    target = tmp_path / "model"
    import_original(target, OriginalFiles(**parts), overrides=[*HEADS, *overrides], **options)
    return target


def test_imported_folder_answers(tmp_path: Path, parts: dict[str, Path]) -> None:
    target = run(tmp_path, parts)
    verify_folder(target)
    model, processor = minigpt4.load(target, device="cpu")
    chat = minigpt4.ChatSession(model, processor)
    assert processor.template == "vicuna-v0"
    from PIL import Image

    chat.add_image(Image.new("RGB", (20, 30), "red"))
    assert isinstance(chat.ask("what is this?", max_new_tokens=3), str)
    assert processor.image_processor.size == {"height": 12, "width": 12}
    assert (model.config.image_token_id, processor.num_image_tokens) == (0, 3)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_tensors_keep_their_bits_and_types_and_the_key_bias_is_zero(tmp_path: Path, parts: dict[str, Path]) -> None:
    written = load_file(run(tmp_path, parts) / "model.safetensors")
    vision = torch.load(parts["vision"], weights_only=True)
    bias = written[f"{LAYERS}.1.self_attn.qkv.bias"]
    assert bias.dtype == torch.float16
    assert torch.equal(bias[:24], vision["blocks.1.attn.q_bias"])
    assert not bias[24:48].any()
    assert torch.equal(bias[48:], vision["blocks.1.attn.v_bias"])
    assert torch.equal(written[f"{LAYERS}.2.mlp.fc1.weight"], vision["blocks.2.mlp.fc1.weight"])
    qformer = torch.load(parts["qformer"], weights_only=True)["model"]
    assert torch.equal(written["model.query_tokens"], qformer["query_tokens"])
    assert written["model.query_tokens"].dtype == torch.float32
    assert f"{LAYERS}.3.mlp.fc1.weight" not in written


def test_many_shards_make_the_same_model(tmp_path: Path, parts: dict[str, Path]) -> None:
    whole = load_file(run(tmp_path, parts) / "model.safetensors")
    (tmp_path / "model").rename(tmp_path / "whole")
    target = run(tmp_path, parts, shard_bytes=20_000)
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  (it has no iterator)
                assert index["weight_map"][name] == file.name
                assert torch.equal(content.get_tensor(name), whole[name])
    minigpt4.load(target, device="cpu")


def test_model_without_a_qformer_is_imported_with_its_own_prompt(tmp_path: Path) -> None:
    sizes = replace(SMALL, grid=4)
    parts = original_files.write(tmp_path, sizes, with_qformer=False)
    del parts["qformer"]
    target = tmp_path / "model"
    made = import_original(target, OriginalFiles(**parts), overrides=HEADS[:1])
    model, processor = minigpt4.load(target, device="cpu")
    assert made.template == processor.template == "llama-2"
    assert processor.num_image_tokens == 4
    assert torch.equal(model.model.vision_model.post_layernorm.weight, torch.ones(24))
    assert not model.model.vision_model.post_layernorm.bias.any()


def test_projection_is_new_and_repeatable_where_no_checkpoint_is_given(tmp_path: Path, parts: dict[str, Path]) -> None:
    del parts["projection"]
    made = import_original(tmp_path / "one", OriginalFiles(**parts), overrides=HEADS)
    import_original(tmp_path / "two", OriginalFiles(**parts), overrides=HEADS)
    assert any("projection is new" in note for note in made.notes)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    weight = one["model.language_projection.weight"]
    assert torch.equal(weight, two["model.language_projection.weight"])
    assert 0.2 < weight.abs().max() <= 0.25  # a linear layer's own bound, one by the root of what it reads
    assert weight.std() > 0.1


def test_checkpoint_that_trained_more_replaces_what_the_other_files_hold(
    tmp_path: Path, parts: dict[str, Path]
) -> None:
    content = torch.load(parts["projection"], weights_only=True)
    content["model"]["query_tokens"] = torch.full((1, 3, 16), 7.0)
    torch.save(content, parts["projection"])
    assert (load_file(run(tmp_path, parts) / "model.safetensors")["model.query_tokens"] == 7).all()


def test_converted_blip2_of_flan_t5_xxl_gives_the_same_model(tmp_path: Path, parts: dict[str, Path]) -> None:
    first = load_file(run(tmp_path, parts) / "model.safetensors")
    hub = write_hub_folder(tmp_path / "hub", first, {"model_type": "t5", "d_model": 4096})
    target = tmp_path / "second"
    given = OriginalFiles(hub, parts["language_model"], None, parts["projection"])
    made = import_original(target, given, overrides=HEADS)
    second = load_file(target / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert made.plan.used[hub] > 100


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"model_type": "opt", "hidden_size": 2560}, "a opt language model 2560 wide"),
        ({"model_type": "t5", "d_model": 2048}, "a t5 language model 2048 wide"),
        ({}, "a opt language model unknown wide"),
    ],
)
def test_converted_blip2_of_another_language_model_is_refused_with_the_reason(
    text: dict[str, Any], named: str, tmp_path: Path, parts: dict[str, Path]
) -> None:
    hub = write_hub_folder(tmp_path / "hub", load_file(run(tmp_path, parts) / "model.safetensors"), text)
    with pytest.raises(WeightsError) as error:
        import_original(tmp_path / "second", OriginalFiles(hub, parts["language_model"]), overrides=HEADS)
    assert named in error.value.message
    assert "flan-t5-xxl" in error.value.message


def write_hub_folder(folder: Path, tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> Path:
    """A BLIP-2 folder as hubs hold it, with this model's vision encoder and Q-Former."""
    folder.mkdir()
    inside = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith(("model.vision_model.", "model.qformer.", "model.query_tokens"))
    }
    other = {"language_projection.weight": torch.zeros(8, 16), "language_model.shared.weight": torch.zeros(4, 8)}
    save_file(inside | other, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2", "text_config": text}), encoding="utf-8")
    return folder


Damage = Callable[[dict[str, Path]], Any]


def swap(one: str, two: str) -> Damage:
    return lambda parts: parts.update({one: parts[two], two: parts[one]})


def rewrite(part: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(parts: dict[str, Path]) -> None:
        content = torch.load(parts[part], weights_only=True)
        change(content.get("model", content))
        torch.save(content, parts[part])

    return damage


def make_delta(parts: dict[str, Path]) -> None:
    for file in parts["language_model"].glob("*.bin"):
        content = torch.load(file, weights_only=True)
        torch.save({name: tensor * 0.01 for name, tensor in content.items()}, file)


def change_config(parts: dict[str, Path], **values: Any) -> None:
    path = parts["language_model"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        pytest.param(swap("vision", "qformer"), "expected a vision encoder", "--qformer", id="vision is a Q-Former"),
        pytest.param(
            swap("projection", "qformer"), "is a MiniGPT-4 checkpoint, expected a BLIP-2 Q-Former", "--projection",
            id="Q-Former is a checkpoint",
        ),
        pytest.param(
            swap("language_model", "vision"), "is a language model, expected a vision encoder", "--language-model",
            id="vision is a language model",
        ),
        pytest.param(
            lambda parts: parts.update(vision=Path("/path/to/eva_vit_g.pth")), "--vision /path/to/eva_vit_g.pth does",
            "path", id="a placeholder",
        ),
        pytest.param(
            lambda parts: torch.save(original_files.drawn(original_files.second_version(SMALL, 2), 1),
                                     parts["projection"]),
            "MiniGPT-v2 checkpoint, which comes in a later version", "pretrained_minigpt4.pth", id="second version",
        ),
        pytest.param(
            lambda parts: torch.save({"weight": torch.ones(2)}, parts["projection"]),
            "none of the original's files: its first tensor is weight", "--projection", id="something else",
        ),
        pytest.param(
            rewrite("qformer", lambda content: content.update({"opt_proj.weight": content.pop("t5_proj.weight")})),
            "was trained for OPT", "blip2_pretrained_flant5xxl.pth", id="Q-Former of OPT",
        ),
        pytest.param(
            rewrite("qformer", lambda content: content.update({"t5_proj.weight": torch.zeros(2048, 16)})),
            "was trained for flan-t5-xl,", "blip2_pretrained_flant5xxl.pth", id="Q-Former of flan-t5-xl",
        ),
        pytest.param(
            rewrite("projection", lambda content: content.update({"llama_proj.weight": torch.zeros(16, 16),
                                                                  "llama_proj.bias": torch.zeros(16)})),
            "makes 16 numbers a token, the language model in vicuna reads 12", "trained with this language model",
            id="projection of another size",
        ),
        pytest.param(
            rewrite("vision", lambda content: content.pop("blocks.0.attn.qkv.weight")),
            "has no tensor blocks.0.attn.qkv.weight", "fetch the file again", id="tensor missing",
        ),
        pytest.param(make_delta, "is a delta", "apply-delta", id="language model is a delta"),
        pytest.param(
            lambda parts: (parts["language_model"] / "config.json").unlink(), "config.json is missing", "fetch",
            id="no config.json",
        ),
        pytest.param(
            lambda parts: (parts["language_model"] / "config.json").write_text("{"), "cannot be read as JSON", "fetch",
            id="broken config.json",
        ),
        pytest.param(
            lambda parts: change_config(parts, model_type="mystery"), "the model type 'mystery'", "LLaMA",
            id="unknown model type",
        ),
        pytest.param(
            lambda parts: (parts["language_model"] / "tokenizer.model").unlink(), "has no tokenizer",
            "tokenizer.model", id="no tokenizer",
        ),
        pytest.param(
            lambda parts: next(parts["language_model"].glob("*-00002-of-*")).unlink(), "00002-of-00002.bin is missing",
            "fetch", id="shard missing",
        ),
        pytest.param(
            lambda parts: (parts["language_model"] / "added_tokens.json").write_text('{"[PAD]": 380}'),
            "the tokenizer has 381 tokens, the language model's table 380 rows", "v0", id="tokenizer too long",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    damage: Damage, message: str, hint: str, tmp_path: Path, parts: dict[str, Path]
) -> None:
    damage(parts)
    with pytest.raises(MiniGPT4Error) as error:
        run(tmp_path, parts)
    assert message in error.value.message
    assert hint in error.value.hint
    assert "\n" not in error.value.message
    assert not (tmp_path / "model").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_old_ids_are_mended_and_said(tmp_path: Path, parts: dict[str, Path]) -> None:
    change_config(parts, bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    made = import_original(tmp_path / "model", OriginalFiles(**parts), overrides=HEADS)
    assert sum("bos_token_id 0 and eos_token_id 1" in note for note in made.notes) == 1
    model, _ = minigpt4.load(tmp_path / "model", device="cpu")
    assert (model.config.text_config.bos_token_id, model.config.text_config.eos_token_id) == (1, 2)


def test_template_that_does_not_exist_is_refused(tmp_path: Path, parts: dict[str, Path]) -> None:
    with pytest.raises(PromptError, match="no prompt template"):
        run(tmp_path, parts, template="vicuna-v9")
    assert not (tmp_path / "model").exists()


def test_existing_target_is_replaced_only_when_asked_for(tmp_path: Path, parts: dict[str, Path]) -> None:
    run(tmp_path, parts)
    with pytest.raises(StorageError, match="exists already"):
        run(tmp_path, parts)
    run(tmp_path, parts, "vision_config.image_size=16", overwrite=True)
    _, processor = minigpt4.load(tmp_path / "model", device="cpu")
    assert processor.image_processor.size == {"height": 16, "width": 16}


def test_dry_run_writes_nothing(tmp_path: Path, parts: dict[str, Path]) -> None:
    before = sorted(tmp_path.rglob("*"))
    made = import_original(tmp_path / "model", OriginalFiles(**parts), overrides=HEADS, dry_run=True)
    assert made.plan.num_parameters > 10_000
    assert sorted(tmp_path.rglob("*")) == before


def test_interpolation_keeps_the_first_place_and_a_constant_table() -> None:
    table = torch.randn(1, 10, 4)
    table[0, 1:] = 3.0
    bigger = interpolated_positions(table.half(), 5)
    assert bigger.shape == (1, 26, 4)
    assert bigger.dtype == torch.float32
    assert torch.equal(bigger[0, 0], table[0, 0].half().float())
    torch.testing.assert_close(bigger[0, 1:], torch.full((25, 4), 3.0))
    ramp = torch.zeros(1, 17, 1)
    ramp[0, 1:, 0] = torch.arange(4.0).repeat_interleave(4)  # grows from row to row
    grown = interpolated_positions(ramp, 8)[0, 1:, 0].reshape(8, 8)
    assert torch.equal(grown, grown[:, :1].expand(8, 8))
    assert (grown.diff(dim=0) > 0).all()


MOST_BEYOND_THE_LIBRARIES = 300 * 2**20

MEASURED = """
import sys, threading, time
from pathlib import Path
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.names import OriginalFiles
target, *paths = map(Path, sys.argv[1:5])
def own():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) * 1024
seen, ended = [own()], threading.Event()
def watch():
    while not ended.wait(0.01):
        seen.append(own())
thread = threading.Thread(target=watch)
thread.start()
files = OriginalFiles(paths[0], paths[1], paths[2], Path(sys.argv[5]))
import_original(target, files, overrides=sys.argv[6:])
ended.set()
thread.join()
print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_import_needs_little_memory_whatever_the_models_size(tmp_path: Path) -> None:
    sizes = replace(SMALL, text_width=2048, text_layers=5, text_mlp=8192, text_heads=16)
    parts = original_files.write(tmp_path, sizes)
    paths = [parts[name] for name in ("vision", "language_model", "qformer", "projection")]
    command = [sys.executable, "-c", MEASURED, tmp_path / "model", *paths, *HEADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")) > 6e8
    assert int(done.stdout) < MOST_BEYOND_THE_LIBRARIES


def test_exported_files_make_the_same_model(tmp_path: Path, parts: dict[str, Path]) -> None:
    target = run(tmp_path, parts)
    export_original(target, tmp_path / "out")
    again = OriginalFiles(
        tmp_path / "out/eva_vit_g.pth",
        tmp_path / "out/language-model",
        tmp_path / "out/blip2_pretrained_flant5xxl.pth",
        tmp_path / "out/pretrained_minigpt4.pth",
    )
    import_original(tmp_path / "again", again, overrides=HEADS)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
