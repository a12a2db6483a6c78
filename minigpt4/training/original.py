"""The original's train YAMLs as recipes: `train_configs/minigpt4_stage1_pretrain.yaml` and its like.

Every key is mapped, ignored with a sentence that says so, or refused with file and line. What is meant is the
original's training (`compat: original`); where it cannot be had, a sentence says what is done instead.
"""

from pathlib import Path
from typing import Any

from minigpt4.text import counted
from minigpt4.training.original_datasets import NAMES, read_batch_size, read_datasets, read_prompts
from minigpt4.training.original_keys import Keys
from minigpt4.training.recipe import Recipe, make_recipe
from minigpt4.training.recipe_fields import LARGEST_SEED
from minigpt4.weights.original.configs import OriginalYaml, with_dataset_defaults
from minigpt4.weights.original.paths import candidates

ITERS_PER_EPOCH = 10000
"""The original's own, where the YAML says nothing."""

VISION = "vision_model"
SCHEDULES = ("linear_warmup_cosine_lr", "linear_warmup_step_lr")

_MODEL_KEYS = (
    "arch", "model_type", "image_size", "num_query_token", "has_qformer", "llama_model", "q_former_model", "vit_model",
    "ckpt",
)  # fmt: skip
_RUN_KEYS = (
    "task", "lr_sched", "init_lr", "min_lr", "warmup_lr", "warmup_steps", "weight_decay", "beta2", "lr_decay_rate",
    "max_epoch", "iters_per_epoch", "accum_grad_iters", "batch_size_train", "num_workers", "seed", "output_dir", "amp",
    "device", "evaluate", "resume_ckpt_path", "train_splits", "runner", "wandb_log",
)  # fmt: skip
_IGNORED = {
    "each process is one that torchrun starts": (
        "world_size", "dist_url", "distributed", "dist_backend", "rank", "gpu",
    ),
    "nothing is evaluated while training, nor was it in the original; `validation` in a recipe does": (
        "batch_size_eval", "valid_splits", "test_splits", "use_dist_eval_sampler",
    ),
    "metrics.jsonl has every update": ("log_freq",),
    "checkpoints are kept by checkpoint_steps and keep_checkpoints": ("save_freq",),
    "not used, nor was it in the original": ("lr_layer_decay",),
    "a run is named by its folder": ("job_name",),
}  # fmt: skip
_IGNORED_OF_THE_MODEL = {
    "each process has its own device": ("device_8bit",),
    "not used, nor was it in the original": ("prompt",),
    "not used; prompt_template says what stands round a prompt": ("chat_template",),
    "not used; the limit is the language model's own": ("max_context_len",),
}


def recipe_from_original(
    read: OriginalYaml, *, cuda: bool | None = None, check_files: bool = False
) -> tuple[Recipe, list[str]]:
    """Translate a train YAML.

    Args:
        read: The YAML with its model's defaults and the options; its data sets' own YAMLs are looked for here.
        cuda: Whether there is a CUDA device, which `amp` needs; None if that is not known.
        check_files: Refuse data and prompts that are not there; else only say so.

    Returns:
        The recipe, and a sentence for each key that means something else here, or nothing.

    Raises:
        ConfigError: A key that is missing, not known or has a wrong value; what a recipe cannot express; or a file
            that is not there.
    """
    keys = Keys(with_dataset_defaults(read))
    folder, trainable = _model(keys), _trainable(keys)
    vision_learns = VISION in trainable
    content: dict[str, Any] = {
        "model": folder,
        "output": keys.text("run", "output_dir"),
        "seed": keys.whole("run", "seed", least=0, most=LARGEST_SEED),
        "trainable": trainable,
        "precision": _precision(keys, cuda),
        "quantize": _quantize(keys),
        "gradient_checkpointing": _gradient_checkpointing(keys, vision_learns=vision_learns),
        "compat": "original",
        "report_to": ["wandb"] if keys.flag("run", "wandb_log", default=False) else [],
        "workers": keys.whole("run", "num_workers", least=0),
        "data": read_datasets(keys, check_files=check_files),
    }
    keys.rename(("run.seed", "seed"), ("run.num_workers", "workers"), ("run.wandb_log", "report_to"))
    keys.notes.append(
        f"run.output_dir: the run's folder is {content['output']} itself, counted from here; a run that finds "
        "checkpoints there goes on with them"
    )
    prompts, prompt_template = read_prompts(keys, check_files=check_files)
    content["data"]["prompts"] = prompts
    content["stages"] = [{"name": read.path.stem, **_stage(keys), **_texts(keys, prompt_template)}]
    _vision(keys, learns=vision_learns)
    _rest(keys)
    notes = keys.finish((*_MODEL_KEYS, *_RUN_KEYS, *NAMES))
    return make_recipe(content, read.path), notes


def own_folder(read: OriginalYaml) -> Path | None:
    """Return the folder that `ckpt` names in place of the original's file: what an earlier stage here has made."""
    setting = read.model("ckpt")
    if setting is None or not setting.value:
        return None
    return next((path for path in candidates(str(setting.value), setting, read) if path.is_dir()), None)


def has_cuda() -> bool:
    """Whether there is a CUDA device; loads torch."""
    import torch

    return torch.cuda.is_available()


def _model(keys: Keys) -> str:
    """Take what names the model and its files; the folder made of them is the recipe's model."""
    for name in _MODEL_KEYS:
        keys.take("model", name)
    for key in keys.below("model"):
        if key[1] in ("vision_config", "qformer_config", "text_config"):
            keys.take(*key)
    if (own := own_folder(keys.read)) is not None:
        keys.notes.append(f"model.ckpt: {own} is the model; the other files of the section are not read")
        return str(own)
    folder = f"models/{keys.read.path.stem}"
    there = ", ".join(name for name in _MODEL_KEYS if keys.read.model(name) is not None)
    keys.notes.append(
        f"model ({there}): a run makes a model folder of these files in MINIGPT4_HOME and takes that; to train the"
        f" printed recipe by itself, make {folder} by `minigpt4 weights import`"
    )
    return folder


def _trainable(keys: Keys) -> list[str]:
    vision = [] if keys.flag("model", "freeze_vit", default=True) else [VISION]
    frozen = keys.flag("model", "freeze_qformer", default=True)
    has_qformer = keys.read.value("has_qformer", True)
    trainable = [*vision, *([] if frozen or not has_qformer else ["query_tokens", "qformer"]), "language_projection"]
    sentence = f"model.freeze_vit, model.freeze_qformer: trainable is {', '.join(trainable)}"
    if vision:
        sentence += "; vision_model is all of the vision encoder, with the norm after it (ln_vision)"
    keys.notes.append(sentence)
    return trainable


def _vision(keys: Keys, *, learns: bool) -> None:
    """Take how the vision encoder computes, which only matters where it learns."""
    dropped = keys.number("model", "drop_path_rate", default=0)
    if not learns:
        keys.ignore("the vision encoder is frozen and drops nothing", ("model", "drop_path_rate"))
        keys.ignore("frozen parts follow `precision`", ("model", "vit_precision"))
        return
    if dropped > 0:
        keys.refuse(
            ("model", "drop_path_rate"), f"is {dropped:g}, and a vision encoder that learns leaves out no layers here",
            "write 0, or freeze_vit: True",
        )  # fmt: skip
    keys.ignore("the vision encoder leaves out no layers", ("model", "drop_path_rate"))
    keys.ignore(
        "the vision encoder learns, so it is kept in float32 and computes as `precision` says; the original cannot "
        "train it in fp16", ("model", "vit_precision"),
    )  # fmt: skip


def _precision(keys: Keys, cuda: bool | None) -> str:
    """Choose `fp16` where the original has it: `amp` on a CUDA device."""
    device = keys.text("run", "device", default="cuda")
    if device.partition(":")[0] not in ("cuda", "cpu"):
        keys.refuse(("run", "device"), f"is {device!r}, expected cuda or cpu", "write cuda, or remove it")
    on_cuda = device != "cpu" and cuda is not False
    if device == "cpu":
        keys.notes.append("run.device: a run takes the accelerator there is; CUDA_VISIBLE_DEVICES= in front hides it")
    elif cuda is False:
        keys.notes.append(f"run.device: {device}, and there is no CUDA device here: the run takes what there is")
    if not keys.flag("run", "amp", default=False):
        keys.notes.append("run.amp: not True, so precision is fp32; the original computes in fp16 without scaling")
        return "fp32"
    if not on_cuda:
        keys.notes.append("run.amp: fp16 needs a CUDA device, so precision is fp32")
        return "fp32"
    elsewhere = "; where there is no CUDA device a run takes fp32" if cuda is None else ""
    keys.notes.append(f"run.amp, run.device: precision is fp16, as in the original{elsewhere}")
    return "fp16"


def _quantize(keys: Keys) -> str:
    if not keys.flag("model", "low_resource", default=False):
        return "none"
    keys.notes.append("model.low_resource: quantize is int8; the vision encoder stays where the rest is")
    return "int8"


def _gradient_checkpointing(keys: Keys, *, vision_learns: bool) -> bool:
    """Take which activations are computed twice: in a recipe those of every part, which changes no number."""
    wanted = keys.flag("model", "use_grad_checkpoint_llm", default=False)
    keys.rename(("model.use_grad_checkpoint_llm", "gradient_checkpointing"))
    if not vision_learns:
        keys.ignore("the vision encoder is frozen, so nothing of it is kept", ("model", "use_grad_checkpoint"))
        return wanted
    of_vision = keys.flag("model", "use_grad_checkpoint", default=False)
    keys.ignore(
        f"gradient_checkpointing is {of_vision or wanted}, for the vision encoder and the language model alike",
        ("model", "use_grad_checkpoint"),
    )
    return of_vision or wanted


def _stage(keys: Keys) -> dict[str, Any]:
    """Take what the optimizer and its schedule read."""
    schedule = keys.text("run", "lr_sched")
    if schedule not in SCHEDULES:
        hint = f"the original's files have {SCHEDULES[0]}"
        keys.refuse(("run", "lr_sched"), f"is {schedule!r}, expected {' or '.join(SCHEDULES)}", hint)
    beta2 = keys.number("run", "beta2", default=0.999)
    if beta2 >= 1:
        keys.refuse(("run", "beta2"), f"is {beta2}, expected a number below 1", "the original's default is 0.999")
    init_lr = keys.number("run", "init_lr")
    if init_lr == 0:
        keys.refuse(("run", "init_lr"), "is 0, so nothing would be learnt", "the original's are 1e-4 and 3e-5")
    content = {
        "batch_size": read_batch_size(keys),
        **_steps(keys),
        "learning_rate": init_lr,
        "final_learning_rate": keys.number("run", "min_lr"),
        "warmup_learning_rate": keys.number("run", "warmup_lr", least=None, default=-1.0),
        "warmup_steps": keys.whole("run", "warmup_steps", least=0, default=0),
        "schedule": schedule,
        "weight_decay": keys.number("run", "weight_decay"),
        "betas": [0.9, beta2],
        "bucket_batches": 1,
    }
    keys.rename(
        ("run.lr_sched", "schedule"), ("run.init_lr", "learning_rate"), ("run.min_lr", "final_learning_rate"),
        ("run.warmup_lr", "warmup_learning_rate"), ("run.warmup_steps", "warmup_steps"),
        ("run.weight_decay", "weight_decay"), ("run.beta2", "betas"),
    )  # fmt: skip
    if schedule == "linear_warmup_step_lr":
        content["decay_rate"] = decay = keys.number("run", "lr_decay_rate")
        if not 0 < decay <= 1:
            keys.refuse(
                ("run", "lr_decay_rate"), f"is {decay:g}, expected a number above 0, at most 1",
                "0.9 takes a tenth off with each epoch",
            )  # fmt: skip
        keys.rename(("run.lr_decay_rate", "decay_rate"))
    else:
        keys.ignore("linear_warmup_cosine_lr does not use it", ("run", "lr_decay_rate"))
    return content


def _steps(keys: Keys) -> dict[str, int]:
    """Take how long training lasts: the original counts batches, a recipe updates."""
    epochs = keys.whole("run", "max_epoch", least=1)
    batches = keys.whole("run", "iters_per_epoch", least=1, default=ITERS_PER_EPOCH)
    accumulation = keys.whole("run", "accum_grad_iters", least=1, default=1)
    if accumulation > batches:
        keys.refuse(
            ("run", "accum_grad_iters"), f"is {accumulation}, and an epoch has {batches} batches: nothing would change",
            "make iters_per_epoch larger",
        )  # fmt: skip
    if keys.read.settings.get(("run", "iters_per_epoch")) is None:
        keys.notes.append(f"run.iters_per_epoch: missing, so it is the original's {ITERS_PER_EPOCH}")
    steps = epochs * (batches // accumulation)
    sentence = f"run.max_epoch, run.iters_per_epoch: {counted(epochs, 'epoch')} of {batches} batches are steps: {steps}"
    if accumulation > 1:
        sentence += f"; run.accum_grad_iters: {accumulation} batches make one"
        if left := batches % accumulation:
            sentence += f", and the {left} left over at an epoch's end go into the next epoch's first"
        sentence += "; warmup_steps and steps_per_epoch go on counting batches"
    keys.notes.append(sentence)
    return {"steps": steps, "accumulation": accumulation, "steps_per_epoch": batches}


def _texts(keys: Keys, prompt_template: str) -> dict[str, Any]:
    """Take what the text of an example is made with."""
    keys.rename(
        ("model.max_txt_len", "max_text_tokens"), ("model.end_sym", "end_symbol"),
        ("model.prompt_template", "prompt_template"),
    )  # fmt: skip
    content = {
        "max_text_tokens": keys.whole("model", "max_txt_len", least=2, default=32),
        "end_symbol": keys.text("model", "end_sym", default="\n"),
    }
    if not content["end_symbol"]:
        keys.refuse(("model", "end_sym"), "is empty, so no end would be learnt", 'the original has "\\n" and "###"')
    return {**content, "prompt_template": prompt_template} if prompt_template else content


def _rest(keys: Keys) -> None:
    """Take what can only have one value here, and what has no effect."""
    only = {
        "task": "image_text_pretrain",
        "runner": "runner_base",
        "train_splits": ["train"],
        "evaluate": False,
    }
    hints = {"evaluate": "training only trains: write False", "train_splits": 'write ["train"]'}
    for name, expected in only.items():
        setting = keys.take("run", name)
        if setting is not None and setting.value != expected:
            keys.refuse(("run", name), f"is {setting.value!r}, expected {expected!r}", hints.get(name, "remove it"))
        keys.ignore(f"{expected!r} is what a run does anyway", ("run", name))
    if (resume := keys.take("run", "resume_ckpt_path")) is not None:
        keys.refuse(
            ("run", "resume_ckpt_path"), f"is {resume.value!r}, and a run cannot go on from the original's checkpoint",
            "write null: a run goes on by itself with what its own output_dir holds; to begin with the weights of a "
            ".pth file name it as model.ckpt",
        )  # fmt: skip
    keys.ignore("a run goes on by itself with what its output_dir holds", ("run", "resume_ckpt_path"))
    for reason, names in _IGNORED.items():
        keys.ignore(reason, *(("run", name) for name in names))
    for reason, names in _IGNORED_OF_THE_MODEL.items():
        keys.ignore(reason, *(("model", name) for name in names))
    keys.ignore("belongs to evaluation", *keys.below("evaluation_datasets"))
