"""Takes the part of the whole set that is kept in this folder: `python -m tests.golden.take`.

Whole files are copied; of the largest, the cases named here are kept, all else of them as it was recorded.
"""

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from tests.golden import PART, WHOLE

FOLDERS = (
    "configs", "inputs", "weights/vicuna", "delta", "v2/configs",
    "v2/weights/llama2-chat",
)  # fmt: skip
FILES = (
    "weights/eva_vit_g.pth", "weights/blip2_pretrained_flant5xxl.pth", "weights/pretrained_minigpt4.pth",
    "weights/pretrained_minigpt4_minimal.pth", "weights/untrusted_like_reduce.pth",
    "golden/vision.safetensors", "golden/prompt_wrap.safetensors",
    "golden/train_forward_single.safetensors", "golden/train_steps.safetensors",
    "v2/weights/eva_vit_g.pth", "v2/weights/minigptv2_checkpoint_with_ln_vision.pth",
    "v2/weights/minigptv2_checkpoint.pth",
    "v2/golden/vision_ckpt_with_ln_vision.safetensors", "v2/golden/train_forward_single.safetensors",
    "v2/golden/generation.safetensors",
)  # fmt: skip
BROKEN = ("weights/vicuna-LLaMATokenizer", "weights/vicuna-decapoda-style")  # without their copies of the same shards
DIALOGS = r"greedy_two_turn_img|beam5_img|beam5_lenpen_2.0_img1|sample_default_img0"
GRADIENTS = (
    r".*(blocks\.0\.(attn|norm)|Qformer.*layer\.0\.|Qformer.*embeddings|llama_proj|ln_vision|query_tokens|cls_token)"
)
CROPS = 2
SIZES = (0, 2)


def is_kept(pattern: str) -> Callable[[str], bool]:
    """Whether a name begins as a pattern says."""
    return lambda name: re.match(pattern, name) is not None


def take() -> None:
    for path in ("configs", "delta", "golden", "inputs", "v2", "weights"):
        shutil.rmtree(PART / path, ignore_errors=True)
    for path in FOLDERS:
        shutil.copytree(WHOLE / path, PART / path, dirs_exist_ok=True)
    for path in BROKEN:
        shutil.copytree(WHOLE / path, PART / path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin"))
    found = [*WHOLE.glob("golden/*.json"), *WHOLE.glob("v2/golden/*.json")]
    texts = [str(path.relative_to(WHOLE)) for path in found if path.stem != "sensitivity"]
    for path in (*FILES, *texts):
        (PART / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(WHOLE / path, PART / path)
    cut_json("golden/generation.json", "dialogs", lambda dialog: is_kept(DIALOGS)(dialog["name"]))
    cut_json("golden/train_forward.json", "cases", is_kept("single$"))
    cut_json("v2/golden/train_forward.json", "cases", is_kept("single$"))
    cut_tensors("golden/generation.safetensors", is_kept(DIALOGS))
    cut_tensors("golden/train_unfrozen_eval_mode.safetensors", is_kept(f"loss|{GRADIENTS}"))
    cut_tensors("golden/train_image_processor.safetensors", lambda name: int(name[-1]) < CROPS)
    odd = np.load(WHOLE / "golden/eval_image_processor_odd_sizes.npz")
    kept = {f"{kind}_{to}": odd[f"{kind}_{of}"] for to, of in enumerate(SIZES) for kind in ("rgb", "eval")}
    np.savez_compressed(PART / "golden/eval_image_processor_odd_sizes.npz", **kept)


def cut_json(path: str, key: str, keep: Callable[[Any], bool]) -> None:
    content = json.loads((WHOLE / path).read_text(encoding="utf-8"))
    cases = content[key]
    content[key] = {n: c for n, c in cases.items() if keep(n)} if isinstance(cases, dict) else list(filter(keep, cases))
    (PART / path).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def cut_tensors(path: str, keep: Callable[[str], bool]) -> None:
    tensors = load_file(WHOLE / path)
    save_file({name: tensor for name, tensor in tensors.items() if keep(name)}, PART / path)


if __name__ == "__main__":
    take()
