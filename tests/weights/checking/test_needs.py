"""What a placement needs is arithmetic that must agree with published figures, and with what a process really takes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.weights.checking.needs import (
    CACHE,
    DEFAULT_CONTEXT,
    LANGUAGE,
    LIBRARIES,
    MARGIN,
    RESAMPLER,
    VISION,
    WORKING,
    ModelSize,
    Placement,
    fits,
    nearest_fit,
    need,
)

SEVEN = ModelSize(
    parameters={VISION: 985_952_256, RESAMPLER: 105_162_240, "projection": 3_149_824, LANGUAGE: 6_738_415_616},
    packable=6_476_005_376,
    num_layers=32,
    cached_width=2 * 4096,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    vocabulary=32000,
    max_context=2048,
    image_tokens=32,
    image_size=224,
)
GPU = Placement("cuda:0", "float16")
CHILD = """
import json, sys, threading, time

peak = {"RssAnon": 0, "RssFile": 0}

def sample():
    with open("/proc/self/status") as status:
        rows = dict(line.split(":", 1) for line in status)
    return {name: int(rows[name].split()[0]) * 1024 for name in peak}

def watch():
    while True:
        for name, value in sample().items():
            peak[name] = max(peak[name], value)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
folder, dtype, words = sys.argv[1:]
from PIL import Image

from minigpt4.inference.chat import ChatSession
from minigpt4.weights.folder import load

libraries = sample()["RssFile"]
session = ChatSession(*load(folder, device="cpu", dtype=dtype))
session.add_image(Image.new("RGB", (64, 48)))
session.ask("a " * int(words), max_new_tokens=4)
# What is mapped of the weight file counts where the model runs on it; where it was converted, it is the system's again.
mapped = peak["RssFile"] if dtype == "bfloat16" else libraries
print(json.dumps({"bytes": peak["RssAnon"] + mapped, "tokens": session.answer.prompt_tokens + 4}))
"""


def test_figures_of_the_7b_model_are_the_published_ones() -> None:
    # Weights in 16 bits, 8 bits and 4 bits: 13.5, 7.0 and 4.2 GB; 0.524 MB of cache for a token.
    assert need(SEVEN, GPU).on_device[LANGUAGE] == pytest.approx(13.5e9, rel=0.01)
    assert need(SEVEN, replace(GPU, quantize="int8")).on_device[LANGUAGE] == pytest.approx(7.0e9, rel=0.01)
    assert need(SEVEN, replace(GPU, quantize="nf4")).on_device[LANGUAGE] == pytest.approx(4.2e9, rel=0.01)
    assert need(SEVEN, GPU).on_device[VISION] == pytest.approx(1.97e9, rel=0.01)
    assert need(SEVEN, replace(GPU, context=1)).on_device[CACHE] == 524_288


def test_quantization_leaves_the_other_parts_alone() -> None:
    whole, packed = need(SEVEN, GPU).on_device, need(SEVEN, replace(GPU, quantize="nf4")).on_device
    assert {part for part in whole if whole[part] != packed[part]} == {LANGUAGE}


def test_beams_multiply_the_cache() -> None:
    one, five = (need(SEVEN, replace(GPU, num_beams=beams)).on_device for beams in (1, 5))
    assert five[CACHE] == 5 * one[CACHE]
    assert five[WORKING] == 5 * one[WORKING]
    assert five[LANGUAGE] == one[LANGUAGE]


def test_model_that_is_moved_to_a_gpu_passes_through_the_computers_memory() -> None:
    assert need(SEVEN, GPU).loading > 15e9
    assert need(SEVEN, replace(GPU, quantize="int8")).loading < 1e9
    assert need(SEVEN, Placement()).loading == 0
    assert not fits(SEVEN, GPU, {"cpu": 8_000_000_000, "cuda:0": 40_000_000_000})


def test_quantization_is_not_proposed_where_it_saves_little_or_does_not_run() -> None:
    placement = Placement(dtype="bfloat16")
    assert need(SEVEN, replace(placement, quantize="int8")).total == need(SEVEN, placement).total
    near = nearest_fit(SEVEN, Placement(), {"cpu": 20_000_000_000})
    assert near is not None
    assert (near.quantize, near.dtype) == ("none", "bfloat16")
    # On Apple's graphics it does not run at all.
    assert nearest_fit(SEVEN, Placement("mps", "float16"), {"cpu": 12_000_000_000, "mps": 12_000_000_000}) is None


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (24, "--num-beams 5"),  # 17.5 with one beam, 1.3 more for each
        (20, "--num-beams 2"),
        (18, "--num-beams 1"),
        (12, "--quantize nf4 --num-beams 2"),
        (9, "--quantize nf4 --num-beams 1"),
    ],
)
def test_nearest_fit_gives_up_the_least(gigabytes: float, expected: str) -> None:
    wanted = replace(GPU, num_beams=10)
    near = nearest_fit(SEVEN, wanted, {"cpu": 0, "cuda:0": int(gigabytes * 1e9)})
    assert near is None  # the computer's own memory is needed to load it
    near = nearest_fit(SEVEN, wanted, {"cpu": 20_000_000_000, "cuda:0": int(gigabytes * 1e9)})
    assert near is not None
    assert near.as_options(wanted) == expected


def test_other_device_is_taken_when_nothing_else_helps() -> None:
    near = nearest_fit(SEVEN, GPU, {"cpu": 64_000_000_000, "cuda:0": 2_000_000_000, "cuda:1": 40_000_000_000})
    assert near == replace(GPU, device="cuda:1")
    assert nearest_fit(SEVEN, GPU, {"cpu": 2_000_000_000, "cuda:0": 2_000_000_000}) is None


@given(st.integers(1, 12), st.integers(32, 4096), st.integers(1, 80), st.integers(1, 80))
def test_nearest_fit_always_fits_and_is_what_was_wanted_where_that_fits(
    beams: int, context: int, own: int, gpu: int
) -> None:
    wanted = Placement("cuda:0", "float32", "none", beams, context)
    free = {"cpu": own * 10**9, "cuda:0": gpu * 10**9}
    near = nearest_fit(SEVEN, wanted, free)
    if fits(SEVEN, wanted, free):
        assert near == wanted
    if near is not None:
        assert fits(SEVEN, near, free)
        assert near.num_beams <= beams
        assert near.context <= context


def test_nothing_heavy_loads_for_the_arithmetic() -> None:
    code = "import sys, minigpt4.weights.checking.needs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "words"), [("float32", 20), ("float32", 900), ("bfloat16", 20)])
def test_estimate_is_what_a_process_really_takes(dtype: str, words: int, medium_model: Path) -> None:
    from minigpt4.weights.checking.model_size import describe

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(medium_model), dtype, str(words)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    estimated = need(describe(str(medium_model)).size, Placement(dtype=dtype, context=measured["tokens"]))
    assert measured["bytes"] == pytest.approx(estimated.total, rel=MARGIN), estimated
    # The margin must not hide a part that is forgotten: weights and libraries are the most of it.
    assert estimated.total - estimated.on_device[LIBRARIES] > estimated.total / 3
    assert measured["tokens"] < DEFAULT_CONTEXT


@pytest.fixture(scope="module")
def medium_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 110 million numbers, stored in bfloat16."""
    import torch

    from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
    from minigpt4.processing import MiniGPT4ImageProcessor, MiniGPT4Processor
    from tests.processing.tiny_tokenizers import byte_level_kind, image_token_id

    tokenizer = byte_level_kind.__wrapped__()
    tokenizer.pad_token = tokenizer.eos_token
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 12}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = MiniGPT4Config(
        vision_config={"model_type": "blip_2_vision_model", "patch_size": 14, "image_size": 224, **vision},
        qformer_config={"model_type": "blip_2_qformer", **vision},
        text_config={"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **text, **ids},
        image_token_id=image_token_id(tokenizer),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("medium")
    MiniGPT4ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor = MiniGPT4Processor(MiniGPT4ImageProcessor(), tokenizer, num_image_tokens=32, template="chatml")
    processor.save_pretrained(folder)
    return folder
