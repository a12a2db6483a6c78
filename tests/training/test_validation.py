"""Validation looks at the same pictures each time as the stage would, changes nothing, and keeps the best."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2VisionModel

import minigpt4
from minigpt4.inference.chat import ChatSession
from minigpt4.training.run import Reports, run
from minigpt4.training.samples import read_rounds
from minigpt4.training.validation import Validation, answer_pictures
from tests import tiny_chat
from tests.training.whole_run import COLOURS, model_folder, pictures, recipe

__all__ = ["model_folder", "pictures"]  # fixtures

PICTURES = [tiny_chat.picture(seed) for seed in range(3)]
QUESTION = "What is it?"
LAYOUTS = {
    "template": {"layout": "template"},
    "original": {"layout": "original", "prompt_template": "###Human: {} ###Assistant: ", "end_symbol": "###"},
}


def test_validation_loss_is_taken_on_the_same_pictures_each_time(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    validation = {"sources": [{"path": str(pictures)}], "every_steps": 2, "batches": 2, "pictures": 3}
    stages = [{"name": "only", "steps": 4, "batch_size": 3, "learning_rate": 1e-9, "warmup_steps": 0}]
    output = tmp_path / "run"
    run(recipe(model_folder, pictures, output, validation=validation, stages=stages))

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert losses.keys() == {2, 4}
    assert losses[2] == pytest.approx(losses[4], rel=1e-4)  # next to nothing was learnt in between
    best = json.loads((output / "checkpoints/best.json").read_text())
    assert best in {"stage0-step0000002", "stage1-step0000000"}  # which of both is a matter of rounding
    page = (output / "samples.html").read_text()
    assert page.count("data:image/") == 3 and "it is " in page
    assert [(one.step, len(one.samples)) for one in read_rounds(output)] == [(2, 3), (4, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_reads_texts_as_its_stage_does(
    layout: str, model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """Over the pictures that are learnt from, its loss is the update's: the same question, cleaning and end."""
    sources = [{"path": str(pictures), "captions": "blip", "max_words": 2, "caption_prompt": "see: "}]
    (pictures / "captions.csv").write_text("file_name,caption\n" + "".join(f"{c}.png,It is: {c}!\n" for c in COLOURS))
    data = {"sources": sources, "crop": False, "prompts": ["<Img><ImageHere></Img> Which colour?"]}
    validation = {"sources": sources, "every_steps": 1, "batches": 1, "pictures": 0}
    stages = [
        {
            "name": "a",
            "steps": 1,
            "batch_size": len(COLOURS),
            "learning_rate": 1e-12,
            "warmup_steps": 0,
            "bucket_batches": 1,
            **LAYOUTS[layout],
        }
    ]
    run(recipe(model_folder, pictures, tmp_path / "run", data=data, validation=validation, stages=stages))

    update, validated = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert validated["validation_loss"] == pytest.approx(update["loss"], rel=1e-4)


@pytest.fixture
def second_is_best(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A section `validation` whose loss is the smallest after the second of four updates."""
    monkeypatch.setattr(Validation, "loss", lambda _, module, stage, step: [2.0, 1.0, 3.0, 4.0][step - 1])
    return {"sources": [{"path": str(pictures)}]}


def test_a_validated_run_leaves_an_alignment_of_its_best_checkpoint(
    second_is_best: dict[str, Any], model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = run(recipe(model_folder, pictures, tmp_path / "run", validation=second_is_best), Reports(say=said.append))

    checkpoint = load_file(tmp_path / "run/checkpoints/stage0-step0000002/trained.safetensors")
    made, last = (load_file(f / "alignment.safetensors") for f in (tmp_path / "run/alignment-best", folder))
    assert {f"model.{name}" for name in made} == checkpoint.keys()
    assert all(torch.equal(tensor, checkpoint[f"model.{name}"]) for name, tensor in made.items())
    assert not torch.equal(made["language_projection.weight"], last["language_projection.weight"])
    assert any("alignment-best is as after update 2 of stage only," in sentence for sentence in said)
    model, _ = minigpt4.load(tmp_path / "run/alignment-best", device="cpu")
    assert torch.equal(model.model.language_projection.weight, made["language_projection.weight"])


def test_a_damaged_best_checkpoint_is_told_and_the_run_ends_well(
    second_is_best: dict[str, Any], model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    wanted = recipe(model_folder, pictures, tmp_path / "run", validation=second_is_best)
    run(wanted)
    (tmp_path / "run/checkpoints/stage0-step0000002/trained.safetensors").write_bytes(b"nothing")
    said: list[str] = []

    assert run(wanted, Reports(say=said.append)).is_dir()

    assert any("smallest validation loss cannot be used" in sentence for sentence in said)


def test_nothing_drops_out_in_a_validation(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["qformer_config"] |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    (model_folder / "config.json").write_text(json.dumps(config))
    validation = {"sources": [{"path": str(pictures)}], "every_steps": 1, "batches": 1, "pictures": 0}
    stages = [{"name": "only", "steps": 3, "batch_size": 3, "learning_rate": 1e-9, "warmup_steps": 0}]
    changes = {"validation": validation, "stages": stages, "trainable": ["qformer"]}
    run(recipe(model_folder, pictures, tmp_path / "run", **changes))

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, *others = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert others == pytest.approx([first] * 2, rel=1e-5)


def test_validation_changes_nothing_that_is_learnt(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    validation = {"sources": [{"path": str(pictures)}], "every_steps": 1, "batches": 1, "pictures": 2}
    watched = run(recipe(model_folder, pictures, tmp_path / "watched", validation=validation))
    plain = run(recipe(model_folder, pictures, tmp_path / "plain"))

    one, two = (load_file(folder / "alignment.safetensors") for folder in (watched, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_validation_reads_cached_features_with_the_same_loss_and_answers(
    model_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision encoder sees each picture once, as the features are made, and never in a step or a validation."""
    others = tmp_path / "others"
    others.mkdir()
    for number in range(7):
        tiny_chat.picture(number).save(others / f"{number}.png")
        (others / f"{number}.txt").write_text(f"picture {number}")
    (others / "broken.png").write_bytes(b"no picture")
    (others / "broken.txt").write_text("nothing")
    seen: list[int] = []
    forward = Blip2VisionModel.forward

    def counting(self: Blip2VisionModel, pixel_values: torch.Tensor, **options: object) -> object:
        seen.append(len(pixel_values))
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(Blip2VisionModel, "forward", counting)
    validation = {"sources": [{"path": str(others)}], "every_steps": 1, "batches": 2, "pictures": 5}
    data = {"sources": [{"path": str(pictures)}], "crop": False}

    def figures(name: str, **changes: Any) -> tuple[list[float], list[list[str]], int]:
        seen.clear()
        run(recipe(model_folder, pictures, tmp_path / name, data=data, validation=validation, **changes))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        answers = [[sample.answer for sample in one.samples] for one in read_rounds(tmp_path / name)]
        return [line["validation_loss"] for line in lines if "validation_loss" in line], answers, sum(seen)

    losses, answers, looked = figures("computed")
    kept_losses, kept_answers, kept_looked = figures("kept", features="cache")

    assert looked > 4 * (len(COLOURS) + 5)
    assert kept_looked == len(COLOURS) + 7
    assert len(losses) == 4 and kept_losses == pytest.approx(losses, rel=1e-5)  # sums of other batches of pictures
    assert kept_answers == answers and all(len(one) == 5 for one in answers)


@pytest.mark.parametrize("template", ["chatml", "vicuna-v0"])
def test_answers_are_those_of_a_conversation(template: str) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor(template)
    expected = []
    for picture in PICTURES:
        chat = ChatSession(model, processor)
        chat.add_image(picture)
        expected.append(chat.ask(QUESTION, max_new_tokens=12))

    answers = answer_pictures(model, processor, PICTURES, QUESTION, 12)

    assert answers == expected
    assert len(set(answers)) == 3  # each has its own picture


def test_answering_leaves_every_part_in_its_mode_and_able_to_learn() -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    model.train()
    model.model.qformer.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()

    answer_pictures(model, processor, PICTURES, QUESTION, 4)

    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.language_projection.weight.grad.abs().sum() > 0


def test_modes_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    model.train()

    def fail(**inputs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError):
        answer_pictures(model, processor, PICTURES, QUESTION, 4)

    assert model.training


def test_no_pictures_need_no_answers() -> None:
    assert answer_pictures(tiny_chat.model(), tiny_chat.processor(), [], QUESTION, 4) == []
