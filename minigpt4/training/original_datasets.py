"""The sections `datasets` and `preprocess` of the original's train YAMLs, and its prompts, as a recipe's `data`."""

import re
from pathlib import Path
from typing import Any

from minigpt4.errors import ConfigError
from minigpt4.training.original_keys import Keys
from minigpt4.training.recipe_fields import is_prompt_template
from minigpt4.weights.original.configs import DATASET_YAMLS, Key, Setting
from minigpt4.weights.original.paths import candidates, is_placeholder

IMAGE_MARK = "<ImageHere>"
"""As in `minigpt4.data.examples`, which loads torch; a translation needs none."""

FORMATS = {"laion": "shards", "cc_sbu": "shards", "cc_sbu_align": "alignment"}
"""The data sets of MiniGPT-4, and how a recipe names their format."""

NAMES = (
    "storage", "build_info", "data_type", "type", "vis_processor", "text_processor", "sample_ratio", "batch_size",
    "name", "image_size", "min_scale", "max_scale", "mean", "std", "prompt", "max_words",
)  # fmt: skip

_STATISTICS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "min_scale": 0.5,
    "max_scale": 1.0,
}
_RANGE = re.compile(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)")


def read_datasets(keys: Keys, *, check_files: bool) -> dict[str, Any]:
    """Translate the section `datasets`.

    Args:
        keys: Of the YAML; those of the sections are taken.
        check_files: Refuse data that is not there.

    Returns:
        `sources` and `crop` of a recipe's `data`.

    Raises:
        ConfigError: No data set, one that is not known, a contradiction, or data that is not there.
    """
    names = keys.names("datasets")
    for name in names:
        if name not in FORMATS:
            key = next(key for key in keys.read.settings if key[:2] == ("datasets", name))
            raise ConfigError(
                f"{keys.read.settings[key].place}: the data set `{name}` is not one of MiniGPT-4's",
                f"those are {', '.join(FORMATS)}; a recipe of your own takes any data",
            )
        if keys.take("datasets", name) is not None:
            keys.refuse(("datasets", name), "has a value, keys below it were expected", "indent them below it")
    if not names:
        raise ConfigError(f"{keys.read.path} names no data sets", f"add `datasets:` with one of {', '.join(FORMATS)}")
    shares = _shares(keys, names)
    sources: list[dict[str, Any]] = [
        {"path": _storage(keys, name, check_files=check_files), "format": FORMATS[name], "share": shares[name]}
        for name in names
        if shares[name] > 0
    ]
    crops = {name: _crops(keys, name) for name in names}
    if len(set(crops.values())) > 1:
        other = next(name for name in names if crops[name] != crops[names[0]])
        keys.refuse(
            ("datasets", other, "vis_processor", "train", "name"),
            f"differs from that of {names[0]}; a recipe treats all pictures alike",
            "give all data sets the same vis_processor",
        )
    captions = {}
    for name in names:
        captions[name] = _captions(keys, name)
        keys.ignore("what it says is the only choice there is", ("datasets", name, "data_type"))
        keys.ignore("only the YAML of that name exists", ("datasets", name, "type"))
        keys.ignore("nothing is evaluated while training", *keys.below("datasets", name, "vis_processor", "eval"))
    if keys.below("preprocess"):
        keys.notes.append("preprocess: training follows the processors of each data set, as in the original")
    for key in keys.below("preprocess"):
        keys.take(*key)
    drawn = [name for name in names if shares[name] > 0]
    for source, name in zip(sources, drawn, strict=True):
        source |= captions[name]
    return {"sources": sources, "crop": crops[names[0]]}


def read_batch_size(keys: Keys) -> int:
    """Take the batch size: `run.batch_size_train`, or in later files the `batch_size` of each data set.

    Raises:
        ConfigError: There is none, or they contradict each other.
    """
    places: list[Key] = [("datasets", name, "batch_size") for name in keys.names("datasets")]
    there = [key for key in (("run", "batch_size_train"), *places) if keys.read.settings.get(key) is not None]
    sizes = [keys.whole(*key, least=1) for key in there]
    if not there:
        return keys.whole("run", "batch_size_train", least=1)
    keys.rename(*((".".join(key), "batch_size") for key in there))
    for key, size in zip(there[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            keys.refuse(key, f"is {size}, and {'.'.join(there[0])} is {sizes[0]}", "give both the same number")
    return sizes[0]


def read_prompts(keys: Keys, *, check_files: bool) -> tuple[list[str], str]:
    """Read `prompt_path` and `prompt_template`.

    Returns:
        Prompts, each with a place for the picture, and what stands round them; without prompts the picture stands
        alone.

    Raises:
        ConfigError: The file is not there or has no prompt, or the template has no place for one.
    """
    template = keys.text("model", "prompt_template", default="")
    setting = keys.take("model", "prompt_path")
    if setting is None or not setting.value:
        return [], ""
    if not template:
        keys.notes.append(
            "model.prompt_path: without a prompt_template every prompt is empty, as in the original; the picture "
            "stands alone"
        )
        return [], ""
    if not is_prompt_template(template):
        keys.refuse(
            ("model", "prompt_template"), f"is {template!r}, expected one {{}} for the prompt, and no other brace",
            "the original's is '###Human: {} ###Assistant: '",
        )  # fmt: skip
    return _prompts_of(keys, setting, check_files=check_files), template


def _prompts_of(keys: Keys, setting: Setting, *, check_files: bool) -> list[str]:
    for path in candidates(str(setting.value), setting, keys.read):
        if path.is_file():
            break
    else:
        problem = f"names {str(setting.value)!r}, which does not exist"
        if check_files:
            keys.refuse(("model", "prompt_path"), problem, "name a file with one prompt a line")
        keys.notes.append(f"model.prompt_path: {problem}; a run refuses that")
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting.place}: cannot read the prompts in {path}", "name a file of text") from error
    prompts = [line for line in lines if IMAGE_MARK in line]  # as the original does
    if not prompts:
        keys.refuse(
            ("model", "prompt_path"), f"names {path}, where no line has {IMAGE_MARK}",
            "write one prompt a line: <Img><ImageHere></Img> Describe this image.",
        )  # fmt: skip
    dropped = len([line for line in lines if line.strip()]) - len(prompts)
    left = f"; lines without {IMAGE_MARK} are left out: {dropped}" if dropped else ""
    keys.notes.append(f"model.prompt_path: the {len(prompts)} prompts of {path} are data.prompts{left}")
    return prompts


def _shares(keys: Keys, names: list[str]) -> dict[str, float]:
    """Take the `sample_ratio` of each data set; without any, all are drawn alike."""
    places: dict[str, Key] = {name: ("datasets", name, "sample_ratio") for name in names}
    given = [name for name in names if keys.read.settings.get(places[name]) is not None]
    if given and len(given) < len(names):
        lacking = next(name for name in names if name not in given)
        keys.refuse(places[given[0]], f"is there, and {lacking} has none", "give one to every data set, or to none")
    shares = {name: keys.number(*places[name], default=1.0) for name in names}
    if not any(shares.values()):
        keys.refuse(places[names[0]], "is 0 for every data set", "give one of them more")
    for name in names:
        if shares[name] == 0:
            keys.notes.append(f"datasets.{name}.sample_ratio: 0, so the data set is left out")
    keys.rename(*((f"datasets.{name}.sample_ratio", "share") for name in given if shares[name] > 0))
    for name in [name for name in names if shares[name] == 0]:
        keys.take("datasets", name, "build_info", "storage")
    return shares


def _crops(keys: Keys, name: str) -> bool:
    """Take the picture processor; returns whether a random part is cut out of each picture."""
    place: Key = ("datasets", name, "vis_processor", "train")
    for key, usual in _STATISTICS.items():
        setting = keys.take(*place, key)
        if setting is not None and setting.value != usual:
            keys.refuse((*place, key), f"is {setting.value}, only the original's {usual} can be had", "remove it")
    keys.take(*place, "image_size")  # compared with the model's when the file was read
    processor = keys.text(*place, "name", default="")
    full = ".".join((*place, "name"))
    if not processor:
        keys.notes.append(f"{full}: missing, so blip2_image_train is taken: a random part of each picture")
        return True
    if processor == "blip2_image_eval":
        keys.notes.append(f"{full}: blip2_image_eval is data.crop false: pictures are taken whole")
        return False
    if keys.read.value("arch") == "minigpt4":
        keys.notes.append(
            f"{full}: blip2_image_train is data.crop false: with `arch: minigpt4` the original takes pictures whole "
            "(since November 2023)"
        )
        return False
    keys.notes.append(f"{full}: blip2_image_train is data.crop true: a random part of each picture")
    return True


def _captions(keys: Keys, name: str) -> dict[str, Any]:
    """Take the text processor; returns how captions are read. Whatever it says, `cc_sbu_align` is read as it is."""
    place: Key = ("datasets", name, "text_processor", "train")
    processor = keys.text(*place, "name", default="blip_caption")
    if processor != "blip_caption":
        keys.refuse((*place, "name"), f"is {processor!r}, expected blip_caption", "write blip_caption, or remove it")
    if FORMATS[name] == "alignment":
        reason = "captions of this data set are taken as they are, as in the original"
        keys.ignore(reason, (*place, "name"), *keys.below("datasets", name, "text_processor"))
        return {"captions": "as_is"}
    content: dict[str, Any] = {"captions": "blip"}
    if keys.take(*place, "max_words") is not None:
        content["max_words"] = keys.whole(*place, "max_words", least=1)
    if prompt := keys.text(*place, "prompt", default=""):
        content["caption_prompt"] = prompt
    full = ".".join(place)
    keys.rename((f"{full}.max_words", "max_words"), (f"{full}.prompt", "caption_prompt"))
    keys.ignore("captions are cleaned as the original cleaned them (captions: blip)", (*place, "name"))
    keys.ignore("nothing is evaluated while training", *keys.below("datasets", name, "text_processor", "eval"))
    return content


def _storage(keys: Keys, name: str, *, check_files: bool) -> str:
    """Take `build_info.storage`, and turn a range of shards into their folder."""
    key: Key = ("datasets", name, "build_info", "storage")
    setting = keys.take(*key)
    option = f"--options datasets.{name}.build_info.storage=PATH"
    if setting is None or not setting.value:
        problem = f"gives no {'.'.join(key)}, and {DATASET_YAMLS[name]} was not found near it"
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
        keys.notes.append(f"{'.'.join(key)}: still the placeholder {text!r}; a run needs {option}")
        return folder
    for path in candidates(folder, setting, keys.read):
        if path.exists():
            _compare(keys, key, path, shards)
            return folder if path == Path.cwd() / folder else str(path)
    if check_files:
        keys.refuse(key, f"names {text!r}, which does not exist", f"put the path there, or add {option}")
    keys.notes.append(f"{'.'.join(key)}: {text!r} does not exist here; a run refuses that")
    return folder


def _shards(keys: Keys, key: Key, text: str) -> tuple[str, list[str]]:
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


def _compare(keys: Keys, key: Key, folder: Path, shards: list[str]) -> None:
    """Compare the shards that a range names with those of the folder, all of which will be read."""
    if not shards:
        return
    there = {path.name for path in folder.glob("*.tar")}
    wanted = set(shards)
    if not there & wanted:
        keys.refuse(key, f"names {shards[0]} to {shards[-1]}, and {folder} holds none of them", "name their folder")
    if extra := sorted(there - wanted):
        keys.refuse(
            key, f"leaves out {extra[0]}, which lies in {folder}, and every shard of a folder is read",
            "move the others elsewhere, or widen the range",
        )  # fmt: skip
    missing = len(wanted - there)
    said = f", {missing} of which are not there" if missing else ""
    keys.notes.append(f"{'.'.join(key)}: every shard of {folder} is read, for {shards[0]} to {shards[-1]}{said}")
