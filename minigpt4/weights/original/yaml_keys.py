"""Every key of the original's YAML files: whether it is used, ignored with a sentence, or has one possible value.

One table for both uses of a file: `yaml` reads it for answers, `training.original` makes a recipe of it.
"""

from dataclasses import dataclass
from typing import Any

from minigpt4.weights.original.sizes import SECTIONS

Place = tuple[str, ...]
"""A key with the sections above it: `("model", "ckpt")`."""


@dataclass(frozen=True)
class Key:
    """What one key means here.

    Args:
        answers: Why it is ignored where a model answers; empty if it is used.
        recipe: Name in a recipe, if training only names it otherwise.
        training: Why training ignores it; empty if it is used.
        kind: Type of its value, where it is checked for every file.
        example: Such a value.
        only: The one value that training takes, in a tuple; empty if others are.
        hint: What to write in place of another value.
    """

    answers: str = ""
    recipe: str = ""
    training: str = ""
    kind: type | None = None
    example: str = ""
    only: tuple[Any, ...] = ()
    hint: str = "remove it"


def _keys(above: str, names: str, key: Key) -> dict[str, Key]:
    return dict.fromkeys((f"{above}.{name}" for name in names.split()), key)


OF_TRAINING = "for training only, not used for answers"
_NOT_USED = "not used, nor was it in the original"
_NO_EVALUATION = "nothing is evaluated while training"

KEYS: dict[str, Key] = {
    **_keys("model", "arch model_type", Key()),
    "model.image_size": Key(kind=int, example="224"),
    "model.num_query_token": Key(kind=int, example="32"),
    **_keys("model", "low_resource has_qformer", Key(kind=bool, example="True")),
    "model.llama_model": Key(kind=str, example='"weights/vicuna-7b"'),
    "model.q_former_model": Key(kind=str, example='"weights/blip2_pretrained_flant5xxl.pth"'),
    "model.vit_model": Key(kind=str, example='"weights/eva_vit_g.pth"'),
    "model.ckpt": Key(kind=str, example='"weights/prerained_minigpt4_7b.pth"'),
    **{f"model.{section}.**": Key() for section in SECTIONS},
    **_keys("model", "freeze_vit freeze_qformer drop_path_rate use_grad_checkpoint prompt_path", Key(OF_TRAINING)),
    "model.use_grad_checkpoint_llm": Key(OF_TRAINING, recipe="gradient_checkpointing"),
    "model.max_txt_len": Key(OF_TRAINING, recipe="max_text_tokens"),
    "model.end_sym": Key(OF_TRAINING, recipe="end_symbol"),
    "model.prompt_template": Key(OF_TRAINING, recipe="prompt_template"),
    "model.vit_precision": Key("is replaced by --dtype"),
    "model.device_8bit": Key("is replaced by --device or --gpu-id", training="each process has its own device"),
    "model.prompt": Key(f"is {_NOT_USED}", training=_NOT_USED),
    "model.chat_template": Key(
        "is not used; the prompt comes from model_type",
        training="not used; prompt_template says what stands round a prompt",
    ),
    "model.max_context_len": Key(
        "is not used; the limit is the language model's own", training="not used; the limit is the language model's own"
    ),
    **_keys("model", "lora_r lora_alpha lora_dropout lora_target_modules", Key("is not used", training="not used")),
    "run.task": Key(only=("image_text_pretrain",)),
    "run.runner": Key(only=("runner_base",)),
    "run.train_splits": Key(only=(["train"],), hint='write ["train"]'),
    "run.evaluate": Key(only=(False,), hint="training only trains: write False"),
    "run.resume_ckpt_path": Key(
        training="a run goes on by itself with what its output_dir holds", only=(None,),
        hint="write null: a run goes on by itself with what its own output_dir holds; to begin with the weights of a "
        ".pth file name it as model.ckpt",
    ),
    "run.seed": Key(recipe="seed"),
    "run.num_workers": Key(recipe="workers"),
    "run.wandb_log": Key(recipe="report_to"),
    "run.batch_size_train": Key(recipe="batch_size"),
    "run.lr_sched": Key(recipe="schedule"),
    "run.init_lr": Key(recipe="learning_rate"),
    "run.min_lr": Key(recipe="final_learning_rate"),
    "run.warmup_lr": Key(recipe="warmup_learning_rate"),
    "run.warmup_steps": Key(recipe="warmup_steps"),
    "run.weight_decay": Key(recipe="weight_decay"),
    "run.beta2": Key(recipe="betas"),
    "run.lr_decay_rate": Key(recipe="decay_rate", training="linear_warmup_cosine_lr does not use it"),
    **_keys("run", "output_dir max_epoch iters_per_epoch accum_grad_iters amp device", Key()),
    **_keys(
        "run", "world_size dist_url distributed dist_backend rank gpu",
        Key(training="each process is one that torchrun starts"),
    ),
    **_keys(
        "run", "batch_size_eval valid_splits test_splits use_dist_eval_sampler",
        Key(training=f"{_NO_EVALUATION}, nor was it in the original; `validation` in a recipe does"),
    ),
    "run.log_freq": Key(training="metrics.jsonl has every update"),
    "run.save_freq": Key(training="checkpoints are kept by checkpoint_steps and keep_checkpoints"),
    "run.lr_layer_decay": Key(training=_NOT_USED),
    "run.job_name": Key(training="a run is named by its folder"),
    "datasets.*.build_info.storage": Key(),
    "datasets.*.sample_ratio": Key(recipe="share"),
    "datasets.*.batch_size": Key(recipe="batch_size"),
    "datasets.*.data_type": Key(training="what it says is the only choice there is"),
    "datasets.*.type": Key(training="only the YAML of that name exists"),
    **_keys("datasets.*.vis_processor.train", "name image_size", Key()),
    "datasets.*.vis_processor.train.mean": Key(only=([0.48145466, 0.4578275, 0.40821073],)),
    "datasets.*.vis_processor.train.std": Key(only=([0.26862954, 0.26130258, 0.27577711],)),
    "datasets.*.vis_processor.train.min_scale": Key(only=(0.5,)),
    "datasets.*.vis_processor.train.max_scale": Key(only=(1.0,)),
    "datasets.*.vis_processor.eval.**": Key(training=_NO_EVALUATION),
    "datasets.*.text_processor.train.name": Key(only=("blip_caption",), hint="write blip_caption, or remove it"),
    "datasets.*.text_processor.train.max_words": Key(recipe="max_words"),
    "datasets.*.text_processor.train.prompt": Key(recipe="caption_prompt"),
    "datasets.*.text_processor.eval.**": Key(training=_NO_EVALUATION),
    "preprocess.**": Key(training="training follows the processors of each data set, as in the original"),
    "evaluation_datasets.**": Key(training="belongs to evaluation"),
}  # fmt: skip
"""Every key of the original's files; `*` is the name of a data set, `**` anything below."""


def known_as(place: Place) -> tuple[str, Key] | None:
    """Return the place, or the part of it that `KEYS` knows, with its meaning; None for a key that is not known."""
    general = (place[0], "*", *place[2:]) if place[0] == "datasets" else place
    if (key := KEYS.get(".".join(general))) is not None:
        return ".".join(place), key
    for size in range(len(place), 0, -1):
        if (key := KEYS.get(".".join((*general[:size], "**")))) is not None:
            return ".".join(place[:size]), key
    return None
