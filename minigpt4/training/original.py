"""The original's train YAMLs as recipes: `train_configs/minigpt4_stage1_pretrain.yaml` and its like.

What is meant is the original's training (`compat: original`); where it cannot be had, a sentence says what is done
instead. The table of `weights.original.yaml_keys` says which keys only have another name here, one possible value or no
effect; the others are translated below. Loads no torch.
"""

import re
from pathlib import Path
from typing import Any

from minigpt4.errors import ConfigError
from minigpt4.text import counted
from minigpt4.training.recipe import Recipe, make_recipe
from minigpt4.training.recipe_yaml import LARGEST_SEED, is_prompt_template
from minigpt4.weights.original.sizes import SECTIONS
from minigpt4.weights.original.yaml import DATASET_YAMLS, Keys, OriginalYaml, is_placeholder, with_dataset_defaults

ITERS_PER_EPOCH = 10000
"""The original's own, where the YAML says nothing."""

IMAGE_MARK = "<ImageHere>"
"""As in `minigpt4.data.examples`, which loads torch."""

VISION = "vision_model"
SCHEDULES = ("linear_warmup_cosine_lr", "linear_warmup_step_lr")
FORMATS = {"laion": "shards", "cc_sbu": "shards", "cc_sbu_align": "alignment"}
"""The data sets of MiniGPT-4, and how a recipe names their format."""

MODEL_KEYS = (
    "arch", "model_type", "image_size", "num_query_token", "has_qformer", "llama_model", "q_former_model", "vit_model",
    "ckpt",
)  # fmt: skip
_RANGE = re.compile(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)")


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
    content: dict[str, Any] = {
        "model": folder,
        "output": keys.text("run.output_dir"),
        "seed": keys.whole("run.seed", least=0, most=LARGEST_SEED),
        "trainable": trainable,
        "precision": _precision(keys, cuda),
        "quantize": _quantize(keys),
        "gradient_checkpointing": _vision(keys, learns=VISION in trainable),
        "compat": "original",
        "report_to": ["wandb"] if keys.flag("run.wandb_log", default=False) else [],
        "workers": keys.whole("run.num_workers", least=0),
        "data": _data(keys, check_files=check_files),
    }
    keys.notes.append(
        f"run.output_dir: the run's folder is {content['output']} itself, counted from here; a run that finds "
        "checkpoints there goes on with them"
    )
    prompts, prompt_template = _prompts(keys, check_files=check_files)
    content["data"]["prompts"] = prompts
    content["stages"] = [{"name": read.path.stem, **_stage(keys), **_texts(keys, prompt_template)}]
    return make_recipe(content, read.path), keys.finish()


def own_folder(read: OriginalYaml) -> Path | None:
    """Return the folder that `ckpt` names in place of the original's file: what an earlier stage here has made."""
    setting = read.model("ckpt")
    if setting is None or not setting.value:
        return None
    return next((path for path in read.candidates(str(setting.value), setting) if path.is_dir()), None)


def has_cuda() -> bool:
    """Return whether there is a CUDA device; loads torch."""
    import torch

    return torch.cuda.is_available()


def _model(keys: Keys) -> str:
    """Take what names the model and its files; the folder made of them is the recipe's model."""
    for name in (*(f"model.{name}" for name in MODEL_KEYS), *(n for s in SECTIONS for n in keys.below("model", s))):
        keys.take(name)
    if (own := own_folder(keys.read)) is not None:
        keys.notes.append(f"model.ckpt: {own} is the model; the other files of the section are not read")
        return str(own)
    folder = f"models/{keys.read.path.stem}"
    there = ", ".join(name for name in MODEL_KEYS if keys.read.model(name) is not None)
    keys.notes.append(
        f"model ({there}): a run makes a model folder of these files in MINIGPT4_HOME and takes that; to train the"
        f" printed recipe by itself, make {folder} by `minigpt4 weights import`"
    )
    return folder


def _trainable(keys: Keys) -> list[str]:
    vision = [] if keys.flag("model.freeze_vit", default=True) else [VISION]
    frozen = keys.flag("model.freeze_qformer", default=True) or not keys.read.value("has_qformer", True)
    trainable = [*vision, *([] if frozen else ["query_tokens", "qformer"]), "language_projection"]
    sentence = f"model.freeze_vit, model.freeze_qformer: trainable is {', '.join(trainable)}"
    if vision:
        sentence += "; vision_model is all of the vision encoder, with the norm after it (ln_vision)"
    keys.notes.append(sentence)
    return trainable


def _precision(keys: Keys, cuda: bool | None) -> str:
    """Choose `fp16` where the original has it: `amp` on a CUDA device."""
    device = keys.text("run.device", default="cuda")
    if device.partition(":")[0] not in ("cuda", "cpu"):
        keys.refuse("run.device", f"is {device!r}, expected cuda or cpu", "write cuda, or remove it")
    if device == "cpu":
        keys.notes.append("run.device: a run takes the accelerator there is; CUDA_VISIBLE_DEVICES= in front hides it")
    elif cuda is False:
        keys.notes.append(f"run.device: {device}, and there is no CUDA device here: the run takes what there is")
    if not keys.flag("run.amp", default=False):
        keys.notes.append("run.amp: not True, so precision is fp32; the original computes in fp16 without scaling")
        return "fp32"
    if device == "cpu" or cuda is False:
        keys.notes.append("run.amp: fp16 needs a CUDA device, so precision is fp32")
        return "fp32"
    elsewhere = "; where there is no CUDA device a run takes fp32" if cuda is None else ""
    keys.notes.append(f"run.amp, run.device: precision is fp16, as in the original{elsewhere}")
    return "fp16"


def _quantize(keys: Keys) -> str:
    if not keys.flag("model.low_resource", default=False):
        return "none"
    keys.notes.append("model.low_resource: quantize is int8; the vision encoder stays where the rest is")
    return "int8"


def _vision(keys: Keys, *, learns: bool) -> bool:
    """Take how the vision encoder computes; return whether activations, of all parts, are computed twice."""
    dropped = keys.number("model.drop_path_rate", default=0)
    of_language = keys.flag("model.use_grad_checkpoint_llm", default=False)
    if not learns:
        keys.notes.append("model.drop_path_rate: the vision encoder is frozen and drops nothing")
        keys.ignore("frozen parts follow `precision`", "model.vit_precision")
        keys.ignore("the vision encoder is frozen, so nothing of it is kept", "model.use_grad_checkpoint")
        return of_language
    if dropped > 0:
        keys.refuse(
            "model.drop_path_rate", f"is {dropped:g}, and a vision encoder that learns leaves out no layers here",
            "write 0, or freeze_vit: True",
        )  # fmt: skip
    keys.notes.append("model.drop_path_rate: the vision encoder leaves out no layers")
    keys.ignore(
        "the vision encoder learns, so it is kept in float32 and computes as `precision` says; the original cannot "
        "train it in fp16", "model.vit_precision",
    )  # fmt: skip
    both = keys.flag("model.use_grad_checkpoint", default=False) or of_language
    alike = "for the vision encoder and the language model alike"
    keys.notes.append(f"model.use_grad_checkpoint: gradient_checkpointing is {both}, {alike}")
    return both


def _stage(keys: Keys) -> dict[str, Any]:
    """Take what the optimizer and its schedule read."""
    schedule = keys.text("run.lr_sched")
    if schedule not in SCHEDULES:
        hint = f"the original's files have {SCHEDULES[0]}"
        keys.refuse("run.lr_sched", f"is {schedule!r}, expected {' or '.join(SCHEDULES)}", hint)
    beta2 = keys.number("run.beta2", default=0.999)
    if beta2 >= 1:
        keys.refuse("run.beta2", f"is {beta2}, expected a number below 1", "the original's default is 0.999")
    init_lr = keys.number("run.init_lr")
    if init_lr == 0:
        keys.refuse("run.init_lr", "is 0, so nothing would be learnt", "the original's are 1e-4 and 3e-5")
    content = {
        "batch_size": _batch_size(keys),
        **_steps(keys),
        "learning_rate": init_lr,
        "final_learning_rate": keys.number("run.min_lr"),
        "warmup_learning_rate": keys.number("run.warmup_lr", least=None, default=-1.0),
        "warmup_steps": keys.whole("run.warmup_steps", least=0, default=0),
        "schedule": schedule,
        "weight_decay": keys.number("run.weight_decay"),
        "betas": [0.9, beta2],
        "bucket_batches": 1,
    }
    if schedule == "linear_warmup_step_lr":
        content["decay_rate"] = decay = keys.number("run.lr_decay_rate")
        if not 0 < decay <= 1:
            problem = f"is {decay:g}, expected a number above 0, at most 1"
            keys.refuse("run.lr_decay_rate", problem, "0.9 takes a tenth off with each epoch")
    return content


def _batch_size(keys: Keys) -> int:
    """Take `run.batch_size_train`, or the `batch_size` of each data set that later files have."""
    names = [f"datasets.{name}.batch_size" for name in _dataset_names(keys)]
    there = [name for name in ("run.batch_size_train", *names) if keys.get(name)] or ["run.batch_size_train"]
    sizes = [keys.whole(name, least=1) for name in there]
    for name, size in zip(there, sizes, strict=True):
        if size != sizes[0]:
            keys.refuse(name, f"is {size}, and {there[0]} is {sizes[0]}", "give both the same number")
    return sizes[0]


def _steps(keys: Keys) -> dict[str, int]:
    """Take how long training lasts: the original counts batches, a recipe optimizer steps."""
    epochs = keys.whole("run.max_epoch", least=1)
    batches = keys.whole("run.iters_per_epoch", least=1, default=ITERS_PER_EPOCH)
    accumulation = keys.whole("run.accum_grad_iters", least=1, default=1)
    if accumulation > batches:
        problem = f"is {accumulation}, and an epoch has {batches} batches: nothing would change"
        keys.refuse("run.accum_grad_iters", problem, "make iters_per_epoch larger")
    if keys.get("run.iters_per_epoch") is None:
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
    content = {
        "max_text_tokens": keys.whole("model.max_txt_len", least=2, default=32),
        "end_symbol": keys.text("model.end_sym", default="\n"),
    }
    if not content["end_symbol"]:
        keys.refuse("model.end_sym", "is empty, so no end would be learnt", 'the original has "\\n" and "###"')
    return {**content, "prompt_template": prompt_template} if prompt_template else content


def _prompts(keys: Keys, *, check_files: bool) -> tuple[list[str], str]:
    """Take `prompt_path` and `prompt_template`: prompts with a place for the picture, and the text around them."""
    template = keys.text("model.prompt_template", default="")
    setting = keys.take("model.prompt_path")
    if setting is None or not setting.value:
        return [], ""
    if not template:
        keys.notes.append(
            "model.prompt_path: without a prompt_template every prompt is empty, as in the original; the picture "
            "stands alone"
        )
        return [], ""
    if not is_prompt_template(template):
        problem = f"is {template!r}, expected one {{}} for the prompt, and no other brace"
        keys.refuse("model.prompt_template", problem, "the original's is '###Human: {} ###Assistant: '")
    path = next((path for path in keys.read.candidates(str(setting.value), setting) if path.is_file()), None)
    if path is None:
        problem = f"names {str(setting.value)!r}, which does not exist"
        if check_files:
            keys.refuse("model.prompt_path", problem, "name a file with one prompt a line")
        keys.notes.append(f"model.prompt_path: {problem}; a run refuses that")
        return [], template
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting.place}: cannot read the prompts in {path}", "name a file of text") from error
    prompts = [line for line in lines if IMAGE_MARK in line]  # as the original does
    if not prompts:
        hint = f"write one prompt a line: <Img>{IMAGE_MARK}</Img> Describe this image."
        keys.refuse("model.prompt_path", f"names {path}, where no line has {IMAGE_MARK}", hint)
    dropped = sum(bool(line.strip()) for line in lines) - len(prompts)
    left = f"; lines without {IMAGE_MARK} are left out: {dropped}" if dropped else ""
    keys.notes.append(f"model.prompt_path: the {len(prompts)} prompts of {path} are data.prompts{left}")
    return prompts, template


def _dataset_names(keys: Keys) -> list[str]:
    return list(dict.fromkeys(key[1] for key in keys.read.settings if key[0] == "datasets" and len(key) > 1))


def _data(keys: Keys, *, check_files: bool) -> dict[str, Any]:
    """Take the section `datasets`; return `sources` and `crop` of a recipe's `data`."""
    names = _dataset_names(keys)
    for name in names:
        if name not in FORMATS:
            setting = next(setting for key, setting in keys.read.settings.items() if key[:2] == ("datasets", name))
            raise ConfigError(
                f"{setting.place}: the data set `{name}` is not one of MiniGPT-4's",
                f"those are {', '.join(FORMATS)}; a recipe of your own takes any data",
            )
        if keys.take(f"datasets.{name}") is not None:
            keys.refuse(f"datasets.{name}", "has a value, keys below it were expected", "indent them below it")
    if not names:
        raise ConfigError(f"{keys.read.path} names no data sets", f"add `datasets:` with one of {', '.join(FORMATS)}")
    shares = _shares(keys, names)
    crops = {name: _crops(keys, name) for name in names}
    for name in names:
        if crops[name] != crops[names[0]]:
            keys.refuse(
                f"datasets.{name}.vis_processor.train.name",
                f"differs from that of {names[0]}; a recipe treats all pictures alike",
                "give all data sets the same vis_processor",
            )
    sources = []
    for name in names:
        captions = _captions(keys, name)
        if shares[name] > 0:
            path = _storage(keys, name, check_files=check_files)
            sources.append({"path": path, "format": FORMATS[name], "share": shares[name], **captions})
    return {"sources": sources, "crop": crops[names[0]]}


def _shares(keys: Keys, names: list[str]) -> dict[str, float]:
    """Take the `sample_ratio` of each data set; without any, all are drawn alike."""
    keys_of = {name: f"datasets.{name}.sample_ratio" for name in names}
    given = [name for name in names if keys.get(keys_of[name]) is not None]
    if given and len(given) < len(names):
        lacking = next(name for name in names if name not in given)
        keys.refuse(keys_of[given[0]], f"is there, and {lacking} has none", "give one to every data set, or to none")
    shares = {name: keys.number(keys_of[name], default=1.0) for name in names}
    if not any(shares.values()):
        keys.refuse(keys_of[names[0]], "is 0 for every data set", "give one of them more")
    for name in names:
        if shares[name] == 0:
            keys.notes.append(f"datasets.{name}.sample_ratio: 0, so the data set is left out")
            keys.take(f"datasets.{name}.build_info.storage")
    return shares


def _crops(keys: Keys, name: str) -> bool:
    """Take the picture processor; return whether a random part is cut out of each picture."""
    place = f"datasets.{name}.vis_processor.train"
    keys.take(f"{place}.image_size")  # compared with the model's when the file was read
    processor = keys.text(f"{place}.name", default="")
    crop, what = True, "blip2_image_train is data.crop true: a random part of each picture"
    if not processor:
        what = "missing, so blip2_image_train is taken: a random part of each picture"
    elif processor == "blip2_image_eval":
        crop, what = False, "blip2_image_eval is data.crop false: pictures are taken whole"
    elif keys.read.value("arch") == "minigpt4":
        crop, what = (
            False,
            (
                "blip2_image_train is data.crop false: with `arch: minigpt4` the original takes pictures whole (since "
                "November 2023)"
            ),
        )
    keys.notes.append(f"{place}.name: {what}")
    return crop


def _captions(keys: Keys, name: str) -> dict[str, Any]:
    """Take the text processor; return how captions are read."""
    place = f"datasets.{name}.text_processor.train"
    if FORMATS[name] == "alignment":
        others = [key for key in keys.below("datasets", name, "text_processor") if key != f"{place}.name"]
        keys.ignore("captions of this data set are taken as they are, as in the original", *others)
        return {"captions": "as_is"}
    content: dict[str, Any] = {"captions": "blip"}
    if keys.get(f"{place}.max_words") is not None:
        content["max_words"] = keys.whole(f"{place}.max_words", least=1)
    if prompt := keys.text(f"{place}.prompt", default=""):
        content["caption_prompt"] = prompt
    return content


def _storage(keys: Keys, name: str, *, check_files: bool) -> str:
    """Take `build_info.storage`, and turn a range of shards into their folder."""
    key = f"datasets.{name}.build_info.storage"
    setting = keys.take(key)
    option = f"--options {key}=PATH"
    if setting is None or not setting.value:
        problem = f"gives no {key}, and {DATASET_YAMLS[name]} was not found near it"
        if check_files:
            raise ConfigError(f"{keys.read.path} {problem}", f"add {option}")
        keys.notes.append(f"{keys.read.path.name} {problem}; a run needs {option}")
        return f"/path/to/{name}_dataset" if FORMATS[name] == "shards" else f"/path/to/{name}"
    if not isinstance(setting.value, str):
        keys.refuse(key, f"is {setting.value!r}, expected a path", option)
    text = setting.value
    folder, shards = _shards(keys, key, text)
    if is_placeholder(text):
        if check_files:
            keys.refuse(key, f"is still the placeholder {text!r}", f"put the path there, or add {option}")
        keys.notes.append(f"{key}: still the placeholder {text!r}; a run needs {option}")
        return folder
    for path in keys.read.candidates(folder, setting):
        if path.exists():
            _compare(keys, key, path, shards)
            return folder if path == Path.cwd() / folder else str(path)
    if check_files:
        keys.refuse(key, f"names {text!r}, which does not exist", f"put the path there, or add {option}")
    keys.notes.append(f"{key}: {text!r} does not exist here; a run refuses that")
    return folder


def _shards(keys: Keys, key: str, text: str) -> tuple[str, list[str]]:
    """Split `DIR/{00000..10488}.tar` into the folder and the names; other paths have no names."""
    if "{" not in text:
        return text, []
    folder, slash, name = text.rpartition("/")
    found = _RANGE.fullmatch(name)
    if "{" in folder or found is None or int(found[2]) > int(found[3]):
        problem = f"is {text!r}, expected a folder, a .tar or DIR/{{00000..00099}}.tar"
        keys.refuse(key, problem, "name the folder: every shard in it is read")
    before, first, last, after = found.groups()
    width = len(first) if first.startswith("0") or last.startswith("0") else 0
    names = [f"{before}{number:0{width}}{after}" for number in range(int(first), int(last) + 1)]
    return folder or slash or ".", names


def _compare(keys: Keys, key: str, folder: Path, shards: list[str]) -> None:
    """Compare the shards that a range names with those of the folder, all of which will be read."""
    if not shards:
        return
    there, wanted = {path.name for path in folder.glob("*.tar")}, set(shards)
    if not there & wanted:
        keys.refuse(key, f"names {shards[0]} to {shards[-1]}, and {folder} holds none of them", "name their folder")
    if extra := sorted(there - wanted):
        problem = f"leaves out {extra[0]}, which lies in {folder}, and every shard of a folder is read"
        keys.refuse(key, problem, "move the others elsewhere, or widen the range")
    missing = len(wanted - there)
    said = f", {missing} of which are not there" if missing else ""
    keys.notes.append(f"{key}: every shard of {folder} is read, for {shards[0]} to {shards[-1]}{said}")
