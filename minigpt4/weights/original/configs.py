"""The original's YAML files, read key by key: of `eval_configs`, `train_configs` and `minigpt4/configs`.

Every key is mapped, ignored with a sentence that says so, or refused; every complaint names file, key and line. This
module knows what the keys mean; where the files they name lie is the business of `run`.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from minigpt4.errors import ConfigError
from minigpt4.weights.original.values import SECTIONS, as_number

MAX_YAML_BYTES = 2**20
Key = tuple[str, ...]

MODEL_YAMLS = {
    ("mini_gpt4", "pretrain_vicuna"): "minigpt4.yaml",
    ("minigpt4", "pretrain_vicuna0"): "minigpt4_vicuna0.yaml",
    ("minigpt4", "pretrain_llama2"): "minigpt4_llama2.yaml",
    ("minigpt_v2", "pretrain"): "minigpt_v2.yaml",
}
"""Where the original keeps the defaults of a model, by `arch` and `model_type`."""

DATASET_YAMLS = {
    "laion": "laion/defaults.yaml",
    "cc_sbu": "cc_sbu/defaults.yaml",
    "cc_sbu_align": "cc_sbu/align.yaml",
}
"""Where the original keeps the defaults of a data set, by its name."""

TEMPLATES = {
    "pretrain_vicuna": "vicuna-v0",
    "pretrain_vicuna0": "vicuna-v0-spaced",
    "pretrain_llama2": "llama-2",
}
"""The conversation that the original's demo holds, by `model_type`."""

V1_ARCHS, V2_ARCH = ("mini_gpt4", "minigpt4"), "minigpt_v2"

_OF_TRAINING = "for training only, not used for answers"
_MAPPED = (
    "arch", "model_type", "image_size", "num_query_token", "llama_model", "q_former_model", "vit_model", "ckpt",
    "low_resource", "has_qformer", *SECTIONS,
)  # fmt: skip
_IGNORED = {
    "drop_path_rate": _OF_TRAINING,
    "use_grad_checkpoint": _OF_TRAINING,
    "use_grad_checkpoint_llm": _OF_TRAINING,
    "freeze_vit": _OF_TRAINING,
    "freeze_qformer": _OF_TRAINING,
    "max_txt_len": _OF_TRAINING,
    "end_sym": _OF_TRAINING,
    "prompt_path": _OF_TRAINING,
    "prompt_template": _OF_TRAINING,
    "vit_precision": "is replaced by --dtype",
    "device_8bit": "is replaced by --device or --gpu-id",
    "prompt": "is not used, nor was it in the original",
    "chat_template": "is not used; the prompt comes from model_type",
    "max_context_len": "is not used; the limit is the language model's own",
}
_REFUSED = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_RUN = (
    "task", "lr_sched", "init_lr", "min_lr", "warmup_lr", "weight_decay", "max_epoch", "iters_per_epoch",
    "batch_size_train", "batch_size_eval", "num_workers", "warmup_steps", "seed", "output_dir", "amp",
    "resume_ckpt_path", "evaluate", "train_splits", "valid_splits", "test_splits", "device", "world_size", "dist_url",
    "distributed", "accum_grad_iters", "log_freq", "beta2", "lr_decay_rate", "lr_layer_decay", "wandb_log", "job_name",
    "runner", "use_dist_eval_sampler", "dist_backend", "rank", "gpu", "save_freq",
)  # fmt: skip
_TOP = ("model", "datasets", "preprocess", "run", "evaluation_datasets")
_PICTURE_PROCESSORS = ("blip2_image_train", "blip2_image_eval")


@dataclass(frozen=True)
class Setting:
    """One value and where it stands.

    Args:
        value: As YAML has it; numbers such as 1e-4 are numbers.
        file: The YAML file; None for an option of the command line.
        line: Counted from 1.
    """

    value: Any
    file: Path | None
    line: int

    @property
    def place(self) -> str:
        """Where it stands, for a sentence."""
        return f"{self.file}, line {self.line}" if self.file else "--options"


@dataclass
class OriginalYaml:
    """What the original's files say about one model.

    Args:
        path: The file that was named.
        settings: Every value by its dotted place, `("model", "ckpt")`; defaults, file and options merged.
        defaults: The model's own YAML, where one was found.
        notes: One sentence for each kind of key that is ignored.
    """

    path: Path
    settings: dict[Key, Setting]
    defaults: Path | None = None
    notes: list[str] = field(default_factory=list)

    def model(self, name: str) -> Setting | None:
        """Return a value of the section `model`."""
        return self.settings.get(("model", name))

    def value(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return a value of the section `model`, or the original's default."""
        setting = self.model(name)
        return default if setting is None or setting.value is None else setting.value

    @property
    def template(self) -> str:
        """Name of the prompt template that the original's demo uses with this `model_type`."""
        fallback = "vicuna-v0" if self.value("has_qformer", True) else "llama-2"
        return TEMPLATES.get(str(self.value("model_type", "")), fallback)

    @property
    def is_for_training(self) -> bool:
        """Whether it is a train YAML, whose model may have no checkpoint yet; the others have no learning rate."""
        return ("run", "init_lr") in self.settings

    @property
    def overrides(self) -> list[str]:
        """What shapes cannot tell, as `--set` options."""
        found = []
        if (size := self.value("image_size")) is not None:
            found.append(f"vision_config.image_size={size}")
        if (count := self.value("num_query_token")) is not None and self.value("has_qformer", True):
            found.append(f"num_query_tokens={count}")
        for key, setting in self.settings.items():
            if key[0] == "model" and key[1] in SECTIONS and len(key) == 3:
                found.append(f"{key[1]}.{key[2]}={setting.value}")
        return found


def read_original_yaml(path: Path, options: Sequence[str] = ()) -> OriginalYaml:
    """Read one of the original's files with the defaults of its model and the options of the command line.

    Args:
        path: An eval, train or model YAML.
        options: `key=value` each, dotted (`model.ckpt=FILE`), as after the original's `--options`.

    Raises:
        ConfigError: Not a file, not YAML, wrongly indented, a key that is not known, a value of the wrong kind, or a
            model that is not supported.
    """
    own = _read(path)
    given = dict(_read_option(option) for option in options)
    merged = own | given
    _check_structure(path, merged)
    defaults = _find_defaults(path, merged)
    if defaults is not None:
        inherited = _read(defaults)
        _check_structure(defaults, inherited)
        merged = inherited | merged
    found = OriginalYaml(path, merged, defaults)
    _check_model(found)
    _check_pictures(found)
    found.notes = list(_ignored(found))
    return found


def _read(path: Path) -> dict[Key, Setting]:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is too large for a configuration", "name one of the original's YAML files")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"cannot read {path}: {reason}", "--cfg-path names one of the original's YAML files"
        ) from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} holds no keys", "name one of the original's YAML files")
        return dict(_flat(path, loader, node, (), set()))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(
            f"{where}: this is not YAML: {problem}", "check the indentation and the quotes there"
        ) from error
    finally:
        loader.dispose()


def _flat(
    path: Path, loader: yaml.SafeLoader, node: yaml.MappingNode, above: Key, seen: set[int]
) -> Iterator[tuple[Key, Setting]]:
    """Yield every value below a mapping with its place; a key without anything is a None."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = str(loader.construct_object(key_node))
        if name in lines:
            raise ConfigError(
                f"{path}, line {line}: `{name}` stands in line {lines[name]} already", "remove one of them"
            )
        if id(value_node) in seen:
            raise ConfigError(f"{path}, line {line}: `{name}` uses a YAML alias", "write its content out")
        seen.add(id(value_node))
        lines[name] = line
        key = (*above, name)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _flat(path, loader, value_node, key, seen)
            continue
        value = as_number(loader.construct_object(value_node, deep=True))
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}, line {line}: `{name}` refers to another value, {value}", "write the value itself"
            )
        yield key, Setting(value, path, line)


def _read_option(option: str) -> tuple[Key, Setting]:
    key, equals, text = option.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--options {option} has no value", "for example: --options model.low_resource=False")
    try:
        value = as_number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"--options {option}: the value is not YAML", "put it in quotes") from error
    return tuple(key.strip().split(".")), Setting(value, None, 0)


def _check_structure(path: Path, settings: dict[Key, Setting]) -> None:
    """Refuse what stands in the wrong place; the tutorial's own listing has `arch:` beside `model:`."""
    for key, setting in settings.items():
        if key[0] in _TOP:
            if len(key) == 1 and setting.value is not None:
                raise ConfigError(
                    f"{setting.place}: `{key[0]}` has a value, keys below it were expected",
                    "put them in the next lines, indented by two spaces",
                )
            continue
        if key[0] in (*_MAPPED, *_IGNORED, *_REFUSED):
            raise ConfigError(
                f"{setting.place}: `{key[0]}` stands beside `model:`, it belongs below it",
                f"indent that line of {path.name} by two spaces" if setting.file else f"write model.{key[0]}=...",
            )
        if key[0] in _RUN:
            raise ConfigError(f"{setting.place}: `{key[0]}` belongs below `run:`", "indent that line by two spaces")
        raise _unknown(setting, key[0], _TOP)
    if not any(key[0] == "model" and len(key) > 1 for key in settings):
        raise ConfigError(f"{path} has no keys below `model:`", "name one of the original's eval or model YAML files")


def _find_defaults(path: Path, settings: dict[Key, Setting]) -> Path | None:
    """Find the model's own YAML, which the original merges below the one that is named."""
    arch, kind = (settings.get(("model", name)) for name in ("arch", "model_type"))
    name = MODEL_YAMLS.get((str(arch and arch.value), str(kind and kind.value)))
    return _find(path, "models", name) if name else None


def _find(path: Path, kind: str, name: str) -> Path | None:
    """Find a YAML of the original's folder `configs`: in the tree above, or beside the file that was named."""
    here = path.absolute()
    for folder in (*here.parents[:4], Path.cwd()):
        for candidate in (folder / name, folder / "minigpt4/configs" / kind / name, folder / "configs" / kind / name):
            if candidate.is_file() and candidate != here:
                return candidate
    return None


def with_dataset_defaults(read: OriginalYaml) -> OriginalYaml:
    """Put the data sets' own YAMLs below what was read, as the original does; without one nothing changes.

    Args:
        read: A train YAML.

    Raises:
        ConfigError: One of those files is wrong, or holds something else than its data set.
    """
    inherited: dict[Key, Setting] = {}
    for name in dict.fromkeys(key[1] for key in read.settings if key[0] == "datasets" and len(key) > 1):
        found = _find(read.path, "datasets", DATASET_YAMLS[name]) if name in DATASET_YAMLS else None
        if found is None:
            continue
        own = _read(found)
        for key, setting in own.items():
            if key[:2] != ("datasets", name):
                raise _unknown(setting, ".".join(key), [f"datasets.{name}"])
        inherited |= own
    return replace(read, settings=inherited | read.settings)


def _check_model(found: OriginalYaml) -> None:
    """Refuse a model that is not supported, and keys of `model` that are not known."""
    arch = found.model("arch")
    if arch is None or arch.value is None:
        raise ConfigError(f"{found.path} says no `arch` below `model:`", "the original's files say mini_gpt4")
    if arch.value == V2_ARCH or any(found.value(name) for name in _REFUSED):
        raise ConfigError(
            f"{arch.place}: the model is MiniGPT-v2, which comes in a later version of minigpt4",
            "use one of the YAML files of MiniGPT-4",
        )
    if arch.value not in V1_ARCHS:
        raise _unknown(arch, f"arch: {arch.value}", [f"arch: {name}" for name in V1_ARCHS])
    kind = found.model("model_type")
    if kind is not None and kind.value is not None and kind.value not in TEMPLATES:
        raise _unknown(kind, f"model_type: {kind.value}", [f"model_type: {name}" for name in TEMPLATES])
    for key, setting in found.settings.items():
        if key[0] == "model" and len(key) > 1 and key[1] not in (*_MAPPED, *_IGNORED, *_REFUSED):
            raise _unknown(setting, key[1], (*_MAPPED, *_IGNORED))
        if key[0] == "run" and len(key) > 1 and key[1] not in _RUN:
            raise _unknown(setting, key[1], _RUN)
    for name, kinds in _KINDS.items():
        given = found.model(name)
        if given is not None and given.value is not None and type(given.value) not in kinds:
            raise ConfigError(
                f"{given.place}: `{name}` is {given.value!r}, expected {_KIND_NAMES[kinds[0]]}",
                f"for example: {name}: {_EXAMPLES[name]}",
            )


_KINDS: dict[str, tuple[type, ...]] = {
    "image_size": (int,),
    "num_query_token": (int,),
    "low_resource": (bool,),
    "has_qformer": (bool,),
    "llama_model": (str,),
    "q_former_model": (str,),
    "vit_model": (str,),
    "ckpt": (str,),
}
_KIND_NAMES = {int: "a whole number", bool: "True or False", str: "a path"}
_EXAMPLES = {
    "image_size": "224",
    "num_query_token": "32",
    "low_resource": "True",
    "has_qformer": "True",
    "llama_model": '"weights/vicuna-7b"',
    "q_former_model": '"weights/blip2_pretrained_flant5xxl.pth"',
    "vit_model": '"weights/eva_vit_g.pth"',
    "ckpt": '"weights/prerained_minigpt4_7b.pth"',
}


def _check_pictures(found: OriginalYaml) -> None:
    """Refuse a picture processor that does not exist, or makes pictures of another size than the model reads."""
    size = found.value("image_size")
    for key, setting in found.settings.items():
        if "vis_processor" not in key:
            continue
        if key[-1] == "name" and setting.value not in _PICTURE_PROCESSORS:
            raise _unknown(setting, f"name: {setting.value}", [f"name: {name}" for name in _PICTURE_PROCESSORS])
        if key[-1] == "image_size" and size is not None and setting.value != size:
            raise ConfigError(
                f"{setting.place}: pictures are made {setting.value} wide, the model's image_size is {size}",
                "give both the same number",
            )


def _ignored(found: OriginalYaml) -> Iterator[str]:
    """Say what is read and not used: one sentence for all that is of training, one for each other key."""
    of_training: dict[str, str] = {}
    for key, setting in found.settings.items():
        where = setting.file.name if setting.file else "--options"
        if key[0] == "model" and len(key) > 1 and key[1] in _IGNORED:
            if _IGNORED[key[1]] == _OF_TRAINING:
                of_training[key[1]] = where
            else:
                yield f"{where}: {key[1]} {_IGNORED[key[1]]}"
        elif key[0] == "run":
            of_training["the section run"] = where
        elif "text_processor" in key:
            of_training["text_processor"] = where
        elif key[0] in ("datasets", "evaluation_datasets"):
            of_training["the datasets but for the size of their pictures"] = where
    if of_training:
        yield f"{', '.join(dict.fromkeys(of_training.values()))}: {_OF_TRAINING}: {', '.join(of_training)}"


def _unknown(setting: Setting, key: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return ConfigError(f"{setting.place}: `{key}` is not known", hint)
