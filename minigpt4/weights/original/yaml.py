"""The original's YAML files: of `eval_configs`, `train_configs` and `minigpt4/configs`.

Read with the defaults of their model and with options, checked against the table of `yaml_keys`; every complaint names
file, key and line. Loads no torch.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from minigpt4.errors import ConfigError
from minigpt4.text import did_you_mean
from minigpt4.weights.original.sizes import FAMILIES, SECTIONS, Family, as_number, family_of
from minigpt4.weights.original.yaml_keys import KEYS, OF_TRAINING, Place, known_as

MAX_YAML_BYTES = 2**20
LARGEST_COUNT = 10**9
PLACEHOLDERS = ("/path/to", "path/to/", "path_to", "your_path", "/PATH", "PATH_TO", "please set this value")
PICTURE_PROCESSORS = ("blip2_image_train", "blip2_image_eval")
TOP = ("model", "datasets", "preprocess", "run", "evaluation_datasets")
DATASET_YAMLS = {
    "laion": "laion/defaults.yaml",
    "cc_sbu": "cc_sbu/defaults.yaml",
    "cc_sbu_align": "cc_sbu/align.yaml",
}
"""Where the original keeps the defaults of a data set, by its name."""


@dataclass(frozen=True)
class Setting:
    """One value, and the file (None for an option of the command line) and line that it was read from."""

    value: Any
    file: Path | None
    line: int

    @property
    def place(self) -> str:
        """File and line, for a sentence."""
        return f"{self.file}, line {self.line}" if self.file else "--options"


@dataclass
class OriginalYaml:
    """What the original's files say about one model: defaults, file and options merged.

    Args:
        path: The file that was named.
        settings: Every value by its place.
        defaults: The model's own YAML, where one was found.
        notes: One sentence for each kind of key that is ignored.
    """

    path: Path
    settings: dict[Place, Setting]
    defaults: Path | None = None
    notes: list[str] = field(default_factory=list)

    def model(self, name: str) -> Setting | None:
        """Return a setting of the section `model`."""
        return self.settings.get(("model", name))

    def value(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return a value of the section `model`, or the original's default."""
        setting = self.model(name)
        return default if setting is None or setting.value is None else setting.value

    @property
    def family(self) -> Family:
        """The published model whose `model_type` this is; by its Q-Former where it says none."""
        named = self.value("model_type")
        by_type = (family for family in FAMILIES if family.model_type == named)
        return next(by_type, None) or family_of(has_qformer=self.value("has_qformer", True))

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

    def candidates(self, text: str, setting: Setting) -> list[Path]:
        """List where a path may lie, the likeliest first.

        An absolute path is meant as it is; others count from the YAML's folder, the working directory and the root of
        the original tree, and those of the command line from the working directory first.
        """
        path = Path(text).expanduser()
        if path.is_absolute():
            return [path]
        beside, root = (setting.file or self.path).absolute().parent, self.path.absolute().parent.parent
        order = [beside, Path.cwd(), root] if setting.file else [Path.cwd(), beside, root]
        return [folder / path for folder in dict.fromkeys(order)]


def is_placeholder(text: str) -> bool:
    """Return whether a path is only to be replaced, as in the original's own files."""
    return any(placeholder in text for placeholder in PLACEHOLDERS)


def read_original_yaml(path: Path, options: Sequence[str] = ()) -> OriginalYaml:
    """Read one of the original's files with the defaults of its model and the options of the command line.

    Args:
        path: An eval, train or model YAML.
        options: `key=value` each, dotted (`model.ckpt=FILE`), as after the original's `--options`.

    Raises:
        ConfigError: Not a file, not YAML, wrongly indented, a key that is not known, a value of the wrong kind, or a
            model that is not supported.
    """
    merged = _read(path) | dict(_read_option(option) for option in options)
    _check_structure(path, merged)
    named = tuple(
        str(merged[key].value) if key in merged else "" for key in (("model", "arch"), ("model", "model_type"))
    )
    yamls = (_find(path, "models", family.defaults) for family in FAMILIES if (family.arch, family.model_type) == named)
    if (defaults := next(yamls, None)) is not None:
        inherited = _read(defaults)
        _check_structure(defaults, inherited)
        merged = inherited | merged
    found = OriginalYaml(path, merged, defaults)
    _check_model(found)
    _check_pictures(found)
    found.notes = list(_ignored(found))
    return found


def with_dataset_defaults(read: OriginalYaml) -> OriginalYaml:
    """Put the data sets' own YAMLs below what was read, as the original does; without one nothing changes.

    Raises:
        ConfigError: One of those files is wrong, or holds something else than its data set.
    """
    inherited: dict[Place, Setting] = {}
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


@dataclass
class Keys:
    """Typed access to the settings of a train YAML, each taken once; the table ignores or refuses what is left.

    Keys are named dotted (`run.seed`). The typed readers refuse another kind, a value out of range, and a key that is
    missing without a default.
    """

    read: OriginalYaml
    notes: list[str] = field(default_factory=list)
    _left: dict[Place, Setting] = field(init=False)
    _renamed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._left = dict(self.read.settings)

    def get(self, name: str) -> Setting | None:
        """Return a setting; None where it is missing or null."""
        setting = self.read.settings.get(tuple(name.split(".")))
        return None if setting is None or setting.value is None else setting

    def take(self, name: str) -> Setting | None:
        """Return a setting that needs no other sentence than a recipe's name for it."""
        place = tuple(name.split("."))
        self._left.pop(place, None)
        known = known_as(place)
        if known is not None and known[1].recipe and self.get(name) is not None:
            self._renamed[name] = known[1].recipe
        return self.get(name)

    def below(self, *above: str) -> list[str]:
        """List the keys below a section that were not taken yet."""
        return [".".join(key) for key in self._left if key[: len(above)] == above and len(key) > len(above)]

    def whole(self, name: str, *, least: int, most: int = LARGEST_COUNT, default: int | None = None) -> int:
        """Return a whole number."""
        value = self._value(name, (int,), f"a whole number from {least}", default)
        if value < least:
            self._refuse_other(name, value, f"a whole number from {least}")
        if value > most:
            self._refuse_other(name, value, f"a whole number up to {most}")
        return int(value)

    def number(self, name: str, *, least: float | None = 0, default: float | None = None) -> float:
        """Return a finite number."""
        expected = "a number" if least is None else f"a number from {least}"
        value = self._value(name, (int, float), expected, default)
        if not abs(value) <= sys.float_info.max:
            self._refuse_other(name, value, expected.replace("a number", "a finite number"))
        if least is not None and value < least:
            self._refuse_other(name, value, expected)
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return True or False."""
        return bool(self._value(name, (bool,), "True or False", default))

    def text(self, name: str, *, default: str | None = None) -> str:
        """Return a text."""
        return str(self._value(name, (str,), "a text", default))

    def _value(self, name: str, kinds: tuple[type, ...], expected: str, default: Any) -> Any:  # noqa: ANN401
        setting = self.take(name)
        if setting is None and default is None:
            raise ConfigError(
                f"{self.read.path}: `{name}` is missing, expected {expected}", f"add it, or --options {name}=VALUE"
            )
        if setting is None:
            return default
        if type(setting.value) not in kinds:
            self._refuse_other(name, setting.value, expected)
        return setting.value

    def ignore(self, reason: str, *names: str) -> None:
        """Take keys that have no effect, and say so of those that are there."""
        there = [name for name in names if self._left.pop(tuple(name.split(".")), None) is not None]
        if there:
            self.notes.append(f"{', '.join(there)}: {reason}")

    def refuse(self, name: str, problem: str, hint: str) -> NoReturn:
        """Complain about a key, with its file and line."""
        setting = self.read.settings.get(tuple(name.split(".")))
        place = setting.place if setting is not None else str(self.read.path)
        raise ConfigError(f"{place}: `{name}` {problem}", hint)

    def _refuse_other(self, name: str, value: object, expected: str) -> NoReturn:
        setting = self.get(name)
        in_file = setting is not None and setting.file is not None
        hint = f"write {expected} there, or override it: --options {name}=VALUE" if in_file else f"write {expected}"
        self.refuse(name, f"is {value!r}, expected {expected}", hint)

    def finish(self) -> list[str]:
        """Return the sentences; what is left is ignored with the table's sentence, or refused."""
        ignored: dict[str, dict[str, None]] = {}
        for place, setting in self._left.items():
            name, known = ".".join(place), known_as(place)
            if known is not None and known[1].only and setting.value not in (None, *known[1].only):
                expected = "null" if known[1].only == (None,) else repr(known[1].only[0])
                self.refuse(name, f"is {setting.value!r}, expected {expected}", known[1].hint)
            if known is not None and (known[1].training or known[1].only):
                reason = known[1].training or f"{known[1].only[0]!r} is what a run does anyway"
                ignored.setdefault(reason, {})[known[0]] = None
            elif len(place) > 1:
                self.refuse(
                    name, "is not known", did_you_mean(place[-1], (key.split(".")[-1] for key in KEYS), "remove it")
                )
        renamed = ", ".join(f"{name} is {new}" for name, new in self._renamed.items())
        sentences = [f"{', '.join(names)}: {reason}" for reason, names in ignored.items()]
        return [*([f"only named otherwise: {renamed}"] if renamed else []), *self.notes, *sentences]


def _read(path: Path) -> dict[Place, Setting]:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is too large for a configuration", "name one of the original's YAML files")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        hint = "--cfg-path names one of the original's YAML files"
        raise ConfigError(f"cannot read {path}: {reason}", hint) from error
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
        hint = "check the indentation and the quotes there"
        raise ConfigError(f"{where}: this is not YAML: {problem}", hint) from error
    finally:
        loader.dispose()


def _flat(
    path: Path, loader: yaml.SafeLoader, node: yaml.MappingNode, above: Place, seen: set[int]
) -> Iterator[tuple[Place, Setting]]:
    """Yield every value below a mapping with its place; a key without anything is a None."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = str(loader.construct_object(key_node))
        if name in lines:
            raise ConfigError(
                f"{path}, line {line}: `{name}` stands in line {lines[name]} already", "remove one of them"
            )
        if id(value_node) in seen:  # an alias could make a small file endless
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


def _read_option(option: str) -> tuple[Place, Setting]:
    key, equals, text = option.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--options {option} has no value", "for example: --options model.low_resource=False")
    try:
        value = as_number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"--options {option}: the value is not YAML", "put it in quotes") from error
    return tuple(key.strip().split(".")), Setting(value, None, 0)


def _find(path: Path, kind: str, name: str) -> Path | None:
    """Find a YAML of the original's folder `configs`: in the tree above, or beside the file that was named."""
    here = path.absolute()
    for folder in (*here.parents[:4], Path.cwd()):
        for candidate in (folder / name, folder / "minigpt4/configs" / kind / name, folder / "configs" / kind / name):
            if candidate.is_file() and candidate != here:
                return candidate
    return None


def _check_structure(path: Path, settings: dict[Place, Setting]) -> None:
    """Refuse what is in the wrong section; the tutorial's own listing has `arch:` beside `model:`."""
    for key, setting in settings.items():
        if key[0] in TOP:
            if len(key) == 1 and setting.value is not None:
                raise ConfigError(
                    f"{setting.place}: `{key[0]}` has a value, keys below it were expected",
                    "put them in the next lines, indented by two spaces",
                )
            continue
        if known_as(("model", key[0])):
            raise ConfigError(
                f"{setting.place}: `{key[0]}` stands beside `model:`, it belongs below it",
                f"indent that line of {path.name} by two spaces" if setting.file else f"write model.{key[0]}=...",
            )
        if known_as(("run", key[0])):
            raise ConfigError(f"{setting.place}: `{key[0]}` belongs below `run:`", "indent that line by two spaces")
        raise _unknown(setting, key[0], TOP)
    if not any(key[0] == "model" and len(key) > 1 for key in settings):
        raise ConfigError(f"{path} has no keys below `model:`", "name one of the original's eval or model YAML files")


def _check_model(found: OriginalYaml) -> None:
    """Refuse a model that is not supported, keys that are not known and values of the wrong kind."""
    arch, kind = found.model("arch"), found.model("model_type")
    if arch is None or arch.value is None:
        raise ConfigError(f"{found.path} says no `arch` below `model:`", "the original's files say mini_gpt4")
    for family in FAMILIES:
        if family.refusal and (arch.value == family.arch or (family.has_lora and found.value("lora_r"))):
            hint = "use one of the YAML files of MiniGPT-4"
            raise ConfigError(f"{arch.place}: the model is {family.name}, which {family.refusal}", hint)
    supported = [family for family in FAMILIES if not family.refusal]
    for setting, name in ((arch, "arch"), (kind, "model_type")):
        known = dict.fromkeys(getattr(family, name) for family in supported)
        if setting is not None and setting.value is not None and setting.value not in known:
            raise _unknown(setting, f"{name}: {setting.value}", [f"{name}: {one}" for one in known])
    for key, setting in found.settings.items():
        if key[0] not in ("model", "run") or len(key) == 1:
            continue
        if (known_key := known_as(key)) is None:
            raise _unknown(setting, ".".join(key[1:]), [name.split(".")[1] for name in KEYS if name.startswith(key[0])])
        expected = known_key[1].kind
        if expected is not None and setting.value is not None and type(setting.value) is not expected:
            what = {int: "a whole number", bool: "True or False", str: "a path"}[expected]
            raise ConfigError(
                f"{setting.place}: `{key[1]}` is {setting.value!r}, expected {what}",
                f"for example: {key[1]}: {known_key[1].example}",
            )


def _check_pictures(found: OriginalYaml) -> None:
    """Refuse a picture processor that does not exist, or makes pictures of another size than the model reads."""
    size = found.value("image_size")
    for key, setting in found.settings.items():
        if "vis_processor" not in key:
            continue
        if key[-1] == "name" and setting.value not in PICTURE_PROCESSORS:
            raise _unknown(setting, f"name: {setting.value}", [f"name: {name}" for name in PICTURE_PROCESSORS])
        if key[-1] == "image_size" and size is not None and setting.value != size:
            raise ConfigError(
                f"{setting.place}: pictures are made {setting.value} wide, the model's image_size is {size}",
                "give both the same number",
            )


def _ignored(found: OriginalYaml) -> Iterator[str]:
    """Yield what is read and not used: one sentence for all that is of training, one for each other key."""
    of_training: dict[str, str] = {}
    for key, setting in found.settings.items():
        where = setting.file.name if setting.file else "--options"
        known_key = known_as(key)
        if key[0] == "model" and known_key is not None and known_key[1].answers:
            if known_key[1].answers == OF_TRAINING:
                of_training[key[1]] = where
            else:
                yield f"{where}: {key[1]} {known_key[1].answers}"
        elif key[0] == "run":
            of_training["the section run"] = where
        elif "text_processor" in key:
            of_training["text_processor"] = where
        elif key[0] in ("datasets", "evaluation_datasets"):
            of_training["the datasets but for the size of their pictures"] = where
    if of_training:
        yield f"{', '.join(dict.fromkeys(of_training.values()))}: {OF_TRAINING}: {', '.join(of_training)}"


def _unknown(setting: Setting, key: str, known: Sequence[str]) -> ConfigError:
    hint = did_you_mean(key, known, f"known are {', '.join(known)}")
    return ConfigError(f"{setting.place}: `{key}` is not known", hint)
