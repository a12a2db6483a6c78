"""The objective is the model's own loss, and packed texts teach what they teach in rows of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.data.examples import IGNORED, TextExample, padded
from minigpt4.data.packing import pack, packed_positions
from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import Outcome, check_packing, language, num_targets
from minigpt4.training.recipe import make_recipe
from minigpt4.training.run import Reports, run
from tests import tiny_chat
from tests.data.sources.source_files import samples, shard, write
from tests.model import tiny
from tests.training import toy


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return toy.model()


def batch() -> dict[str, Any]:
    return toy.ToyBatches(0, toy.longer(Path("out"), 3).stages[0])[0]


def test_language_loss_is_the_models_own(model: MiniGPT4ForConditionalGeneration) -> None:
    given = batch()
    features = model.model.align_image_features(given["vision_outputs"])

    outcome = language(model, given)

    output = model(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        labels=given["labels"],
        mm_encoder_outputs={"image": features},
    )
    targets = given["labels"][:, 1:]
    said = output.logits[:, :-1].argmax(dim=-1)
    hits = (said == targets)[targets != -100].sum().item()
    count = num_targets(given)
    assert outcome.loss.item() / count == pytest.approx(output.loss.item(), abs=1e-5)
    assert (outcome.hits.item(), count) == (hits, int((targets != -100).sum()))


def test_gradients_reach_every_trainable_part_and_nothing_else(model: MiniGPT4ForConditionalGeneration) -> None:
    model.zero_grad(set_to_none=True)
    language(model, batch()).loss.backward()

    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.removeprefix("model.").partition(".")[0] for name in reached}
    assert parts == {"query_tokens", "qformer", "language_projection"}
    model.zero_grad(set_to_none=True)


TEXTS: list[list[tuple[list[int], list[int]]]] = [
    [([10, 11], [20, 21, 22]), ([10, 12, 13], [23]), ([10, 11], [24, 25])],
    [([14], [26, 27, 28, 29, 30, 31, 32, 33])],
]
"""Questions and answers about two pictures; the first row of a batch is longer than the second."""


def example(question: list[int], answer: list[int]) -> TextExample:
    before = [1, *[tiny.IMAGE_TOKEN_ID] * tiny.NUM_IMAGE_TOKENS, *question]
    return TextExample(before + answer, [IGNORED] * len(before) + answer, 0)


def learnt(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> tuple[Outcome, Tensor]:
    model.zero_grad()
    outcome = language(model, batch)
    outcome.loss.backward()
    return outcome, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def model_of(text: str, attention: str, **changes: Any) -> MiniGPT4ForConditionalGeneration:
    config = tiny.config(text=text)
    settings = config.to_dict()
    settings["text_config"] |= changes
    torch.manual_seed(0)
    made = MiniGPT4ForConditionalGeneration._from_config(MiniGPT4Config(**settings), attn_implementation=attention)
    return tiny.randomized(made).eval()


@pytest.mark.parametrize(
    ("text", "attention"), [("llama", "eager"), ("qwen2", "sdpa"), ("gpt2", "eager"), ("gpt_neox", "sdpa")]
)
def test_loss_and_gradient_are_those_of_rows_of_their_own(text: str, attention: str) -> None:
    model = model_of(text, attention)
    pictures = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    apart = [example(*pair) for pairs in TEXTS for pair in pairs]
    rows = [
        pack([example(*pair) for pair in pairs], tiny.IMAGE_TOKEN_ID) if len(pairs) > 1 else example(*pairs[0])
        for pairs in TEXTS
    ]

    of_each = [number for number, pairs in enumerate(TEXTS) for _ in pairs]
    expected, gradient = learnt(model, padded(apart, 0) | {"pixel_values": pictures[of_each]})
    batch = padded(rows, 0) | packed_positions(rows) | {"pixel_values": pictures}
    outcome, joined = learnt(model, batch)

    # Sums in another order: a few units in the last of float32's seven digits.
    assert outcome.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (joined - gradient).norm() < 1e-5 * gradient.norm()
    assert outcome.hits == expected.hits
    assert num_targets(batch) == num_targets(padded(apart, 0)) == 14
    unseen, _ = learnt(model, {name: value for name, value in batch.items() if name != "segment_ids"})
    assert abs(unseen.loss.item() / expected.loss.item() - 1) > 1e-3, "texts that see each other are not told apart"


@pytest.mark.parametrize(("text", "attention"), [("llama, tied", "sdpa"), ("qwen2", "eager"), ("gpt2", "sdpa")])
def test_language_models_that_read_packed_texts_are_allowed(text: str, attention: str) -> None:
    check_packing(model_of(text, attention))


def test_a_language_model_that_counts_places_by_itself_is_refused() -> None:
    mpt = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}
    settings = tiny.config(text="llama").to_dict() | {"text_config": mpt | {"vocab_size": tiny.VOCABULARY}}
    torch.manual_seed(0)
    config = MiniGPT4Config(**settings)
    model = MiniGPT4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()

    with pytest.raises(ConfigError, match="mpt does not read texts side by side"):
        check_packing(tiny.randomized(model))


def test_a_language_model_that_takes_no_such_mask_is_refused() -> None:
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_head": 2, "n_layer": 2, "vocab_size": tiny.VOCABULARY}
    config = MiniGPT4Config(**tiny.config(text="llama").to_dict() | {"text_config": bloom})
    model = MiniGPT4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()

    with pytest.raises(ConfigError, match="bloom does not read texts side by side"):
        check_packing(model)


def test_a_language_model_that_looks_a_little_back_is_refused() -> None:
    with pytest.raises(ConfigError, match="mistral sees 8 places back"):
        check_packing(model_of("llama", "sdpa", model_type="mistral", sliding_window=8))


ASKED = [
    {"image": f"{colour}.png", "question": question, "answer": answer.format(colour)}
    for question, answer in (("What?", "a square"), ("Which colour?", "{}"), ("How many?", "one of them"))
    for colour in ("red", "green", "blue", "white")
]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    from PIL import Image

    for colour in ("red", "green", "blue", "white"):
        (tmp_path / "pics").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pics" / f"{colour}.png")
    return write(tmp_path / "pics" / "questions.json", ASKED)


def settings(tmp_path: Path, source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    if not (folder := tmp_path / "model").exists():
        tiny_chat.model().save_pretrained(folder)
        tiny_chat.processor().save_pretrained(folder)
    stage = {"name": "only", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1, "bucket_batches": 1}
    return {
        "model": str(folder),
        "output": str(tmp_path / "run"),
        "trainable": ["language_projection"],
        "data": {"sources": [source], "crop": False},
        "stages": [stage | changes],
        "workers": 0,
    }


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_them_as_from_the_same_texts_apart(asked: Path, tmp_path: Path) -> None:
    """All texts in each update, so that the order makes no difference but in rounding."""
    said: list[str] = []
    together = settings(tmp_path, {"path": str(asked), "texts_per_picture": 4}, batch_size=4)
    apart = settings(tmp_path, {"path": str(asked)}, batch_size=12)
    run(make_recipe(together | {"output": str(tmp_path / "together")}, Path("made up")), Reports(say=said.append))
    run(make_recipe(apart | {"output": str(tmp_path / "apart")}, Path("made up")))

    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "apart"), rel=1e-4)
    assert any("(24 examples looked at)" in line for line in said)


def test_kept_features_serve_all_texts_of_a_picture(asked: Path, tmp_path: Path) -> None:
    source = {"path": str(asked), "texts_per_picture": 4}
    for features in ("compute", "cache"):
        content = settings(tmp_path, source) | {"features": features, "output": str(tmp_path / features)}
        run(make_recipe(content, Path("made up")))

    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "compute"), rel=1e-5)


def test_the_layout_of_the_original_is_refused_before_a_model_is_loaded(asked: Path, tmp_path: Path) -> None:
    content = settings(tmp_path, {"path": str(asked), "texts_per_picture": 4}, layout="original")
    content["model"] = str(tmp_path / "nowhere")

    with pytest.raises(ConfigError, match="stage only has the layout original, which has no texts side by side"):
        run(make_recipe(content, Path("made up")))


def test_shards_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "0.tar", samples(3))
    content = settings(tmp_path, {"path": str(tmp_path / "shards"), "texts_per_picture": 4})
    content["model"] = str(tmp_path / "nowhere")

    with pytest.raises(ConfigError, match="one text for each of its pictures"):
        run(make_recipe(content, Path("made up")))
