"""A recipe is read whole and exactly, or refused with the place and the cure."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4.errors import ConfigError
from minigpt4.training.recipe import Recipe, make_recipe, read_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def written(folder: Path, **changes: Any) -> Path:
    stage = {"name": "one", "steps": 5, "batch_size": 2, "learning_rate": 0.001}
    content = {"model": "nano", "output": "out", "data": {"sources": [{"path": "pics"}]}, "stages": [stage], **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_recipe_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, seed=4))

    assert (recipe.seed, recipe.output, recipe.data.sources[0].path) == (4, Path("out"), "pics")
    assert (recipe.stages[0].steps, recipe.stages[0].turns) == (5, 4)


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_recipes_of_the_project_are_valid(path: Path) -> None:
    assert read_recipe(path).stages


@pytest.mark.parametrize(
    ("changes", "place", "near"),
    [
        ({"sead": 1}, "unknown key sead", "seed"),
        ({"data": {"sources": [{"path": "p"}], "prompt": "b"}}, "unknown key data.prompt", "prompts"),
        (
            {"stages": [{"name": "a", "objective": "language", "steps": 1, "batch_size": 1, "learningrate": 0.1}]},
            "unknown key stages.0.learningrate",
            "learning_rate",
        ),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_known(
    changes: dict[str, Any], place: str, near: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=place) as told:
        read_recipe(written(tmp_path, **changes))

    assert told.value.hint == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("seed=first", "seed"),
        ("workers=-1", "workers"),
        ("stages.0.steps=0", "stages.0.steps"),
        ("stages.0.objective=sing", "stages.0.objective"),
        ("stages=[]", "stages"),
        ("data.sources.0.share=0", "data.sources.0.share"),
        ("model=7", "model"),
        ("model={vision_model: v, language_model: 3}", "model.language_model"),
        ("seed=-1", "seed"),
        ("seed=9223372036854775808", "seed"),
        ("stages.0.steps=10000000000", "stages.0.steps"),
        ("stages.0.betas=[1.0, 2.0]", "stages.0.betas.0"),
        ("stages.0.betas=[0.9, 1.0]", "stages.0.betas.1"),
        ("stages.0.betas=[-0.1, 0.9]", "stages.0.betas.0"),
        ("stages.0.decay_rate=1.5", "stages.0.decay_rate"),
        ("stages.0.prompt_template='{'", "stages.0.prompt_template"),
        ("stages.0.prompt_template='} {}'", "stages.0.prompt_template"),
        ("stages.0.prompt_template='{} {}'", "stages.0.prompt_template"),
        ("stages.0.prompt_template='### {question} ###'", "stages.0.prompt_template"),
        ("stages.0.prompt_template='Describe it.'", "stages.0.prompt_template"),
        ("stages.0.end_symbol=''", "stages.0.end_symbol"),
        ("stages.0.name=''", "stages.0.name"),
        ("stages.0.threads=100000", "stages.0.threads"),
        ("output=''", "output"),
        ('output="a\\0b"', "output"),
        ("model=''", "model"),
        ("data.prompts=' '", "data.prompts"),
        ("stages.0.data.prompts=''", "stages.0.data.prompts"),
        ("data={sources: [{path: ''}]}", "data.sources.0.path"),
        ("data={sources: [{path: p, share: .inf}]}", "data.sources.0.share"),
        ("data={sources: [{path: p}], prompts: [one, '']}", "data.prompts"),
        ("data={sources: [{path: p}], prompts: 5}", "data.prompts"),
        ("validation={sources: []}", "validation.sources"),
        ("validation={sources: [{path: p}], question: ''}", "validation.question"),
        ("lora.target_modules=[]", "lora.target_modules"),
        ("lora.target_modules=[q_proj, q_proj]", "lora.target_modules"),
        ("trainable=[qformer, qformer]", "trainable"),
        ("report_to=[wandb, wandb]", "report_to"),
    ],
)
def test_wrong_value_is_refused_with_its_place(override: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--set: {place}: "):
        read_recipe(written(tmp_path), [override])


@pytest.mark.parametrize(
    "override", ["stages.0.learning_rate=.nan", "stages.0.clip_norm=.inf", "max_bad_fraction=-.inf", "lora.alpha=.inf"]
)
def test_a_number_is_finite(override: str, tmp_path: Path) -> None:
    place, _, _ = override.partition("=")
    with pytest.raises(ConfigError, match=rf"^--set: {place}: expected a finite number, but it is ") as told:
        read_recipe(written(tmp_path), [override])

    assert told.value.hint


def test_eight_bits_cannot_be_spread(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 cannot be cut"):
        read_recipe(written(tmp_path, parallel="fsdp2", quantize="int8"))


def test_missing_key_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is missing$") as told:
        read_recipe(written(tmp_path, data={}))

    assert told.value.hint == "add that key; the files in recipes/ have it"


def test_one_name_where_a_list_is_expected_is_told_how_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to: expected a list, but it is 'wandb'$") as told:
        read_recipe(written(tmp_path), ["report_to=wandb"])

    assert told.value.hint == "put it in brackets: [...]"


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(tmp_path), ["seed=9", "data.sources.0.path=a=b", "stages.0.steps=7", "stages.0.data.crop=false"]
    )

    assert (recipe.seed, recipe.data.sources[0].path, recipe.stages[0].steps) == (9, "a=b", 7)
    assert recipe.stages[0].data == {"crop": False}


@pytest.mark.parametrize(
    ("override", "there"),
    [
        ("stages.3.steps=1", "stages is a list of 1, counted from 0: stages.0 alone"),
        ("stages.one.steps=1", "stages is a list of 1, counted from 0: stages.0 alone"),
        ("model.qformer=none", "model is 'nano', which has no keys: set model itself, to {key: value, ...}"),
        ("model.x.y=1", "model is 'nano', which has no keys: set model itself, to {key: value, ...}"),
    ],
)
def test_override_of_no_place_is_refused_with_what_is_there(override: str, there: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such place") as told:
        read_recipe(written(tmp_path), [override])

    assert told.value.hint == there


@pytest.mark.parametrize("added", ["seed: 3\nseed: 4\n", "lora: {rank: 3, rank: 4}\n"])
def test_a_key_that_stands_twice_is_refused(added: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + added)

    with pytest.raises(ConfigError, match=r"YAML: the key (seed|rank) stands there twice, in line \d+, column \d+$"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.0.stps=7", "--set: unknown key stages.0.stps"),
        ("stages.0.steps=many", "--set: stages.0.steps: expected a whole number, but it is 'many'"),
        ("lora={rnk: 4}", "--set: unknown key lora.rnk"),
    ],
)
def test_a_mistake_in_an_override_is_told_as_one(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read_recipe(written(tmp_path), [override, "seed=3"])

    assert told.value.message.startswith(sentence)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("output=", "output: expected a path, but it is null"),
        ("model=[nano]", "model: expected a text, but it is ['nano']"),
        ("validation=true", "validation: expected keys with values, but it is true"),
        ("features=yes", "features: expected 'compute' or 'cache', but it is true"),
        ("stages=[]", "stages: expected a list of at least 1, but it is []"),
        ("stages.0.betas=[0.9]", "stages.0.betas: expected a list of more than 1, but it is [0.9]"),
        ("stages.0.steps=yes", "stages.0.steps: expected a number, but it is true"),
        ("stages.0.clip_norm=no", "stages.0.clip_norm: expected a number, but it is false"),
        ("stages.0.steps=0", "stages.0.steps: expected more than 0, but it is 0"),
        ("stages.0.steps=1e10", "stages.0.steps: expected a whole number, but it is '1e10'"),
        ("stages.0.steps=10000000000", "stages.0.steps: expected at most 1,000,000,000, but it is 10000000000"),
        ("stages.0.learning_rate=-1.5", "stages.0.learning_rate: expected more than 0, but it is -1.5"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(override: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read_recipe(written(tmp_path), [override])

    assert told.value.message == f"--set: {reason}"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("max_text_tokens=3", "that key is stages.0.max_text_tokens"),
        ("stages.0.seed=3", "that key is seed"),
        ("data.share=1", "that key is data.sources.0.share"),
        ("sources=[]", "that key is data.sources or validation.sources"),
        ("sed=3", "did you mean seed?"),
    ],
)
def test_a_key_that_belongs_elsewhere_is_told_where(override: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key") as told:
        read_recipe(written(tmp_path), [override])

    assert told.value.hint == hint


def test_a_file_that_is_not_yaml_is_told_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: nano\nstages: [\n")
    with pytest.raises(ConfigError) as told:
        read_recipe(tmp_path / "bad.yaml")

    assert told.value.message.startswith(f"{tmp_path / 'bad.yaml'} is not YAML: expected the node content")
    assert told.value.message.endswith(", in line 3, column 1")


def test_a_mistake_in_the_file_stays_the_files(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + "sed: 4\n")

    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key sed$"):
        read_recipe(path, ["seed=3"])


def test_override_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--set seed has no value"):
        read_recipe(written(tmp_path), ["seed"])


def test_override_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set seed=\[1: the value is not YAML"):
        read_recipe(written(tmp_path), ["seed=[1"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"a: [1", "is not YAML"), (b"- a", "holds no keys"), (b"", "holds no keys"), (b"\xff\xfe\xff", "is not YAML")],
)
def test_file_that_is_no_recipe_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)

    with pytest.raises(ConfigError, match=sentence):
        read_recipe(tmp_path / "recipe.yaml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: !!python/object/apply:os.getcwd []", encoding="utf-8")

    with pytest.raises(ConfigError, match="is not YAML"):
        read_recipe(tmp_path / "recipe.yaml")


PICTURES: dict[str, Any] = {"sources": [{"path": "pics"}]}
ORIGINAL = {"layout": "original", "bucket_batches": 1}


def made(data: dict[str, Any], stage: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    whole = {"name": "one", "steps": 5, "batch_size": 2, "learning_rate": 0.001, **(stage or {})}
    return make_recipe({"output": "out", "data": data, "stages": [whole], **changes}, Path("made up"))


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"end_symbol": "###"}, "layout: template"),
        ({"prompt_template": "###Human: {} ###Assistant: "}, "layout: template"),
        ({"keep_end": False}, "layout: template"),
        ({"turns": 4, **ORIGINAL}, "layout: original"),
        ({"decay_rate": 0.5}, "schedule: cosine"),
        ({"steps_per_epoch": 5}, "schedule: cosine"),
        (
            {"decay_rate": 0.5, "schedule": "linear_warmup_cosine_lr", "steps_per_epoch": 5},
            "schedule: linear_warmup_cosine_lr",
        ),
    ],
    ids=str,
)
def test_what_a_layout_or_a_schedule_does_not_read_is_refused(stage: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as told:
        made(PICTURES, stage)

    key = next(iter(stage))
    assert told.value.message == f"made up: stages.0.{key} changes nothing: it is not read with {reason}"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"lora": {"rank": 16}, "trainable": ["qformer"]}, "lora.rank"),
        ({"model": {"vision_model": "v", "language_model": "l"}, "joining_parts": "trained"}, "joining_parts"),
        ({"validation": {**PICTURES, "pictures": 0, "question": "What?"}}, "validation.question"),
        ({"data": {"sources": [{"path": "p", "max_words": 5}]}}, "data.sources.0: max_words"),
    ],
    ids=str,
)
def test_what_a_run_does_not_read_is_refused(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^made up: {place} changes nothing: "):
        made(**{"data": PICTURES, **changes})


def test_a_source_of_one_stage_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"^made up: stages\.0\.data\.sources\.0: max_words changes nothing"):
        made(PICTURES, {"data": {"sources": [{"path": "p", "max_words": 5}]}})


def test_what_stands_on_the_command_line_is_told_as_such() -> None:
    content = {"output": "out", "data": PICTURES, "lora": {"rank": 4}}
    stage = {"name": "one", "steps": 5, "batch_size": 2, "learning_rate": 0.001}
    with pytest.raises(ConfigError, match=r"^--set: lora\.rank changes nothing"):
        make_recipe({**content, "stages": [stage]}, Path("made up"), ["lora.rank"])


@pytest.mark.parametrize(
    ("data", "stage", "changes"),
    [
        (PICTURES, {"layout": "template", "mix": "samples", "keep_end": True, "decay_rate": None}, {}),
        (PICTURES, {"steps_per_epoch": 5, "layout": "template"}, {"compat": "original"}),
        (PICTURES, {"end_symbol": "\n", "prompt_template": "{}", "keep_end": False, **ORIGINAL}, {}),
        (PICTURES, {"max_text_tokens": 20, "turns": 2, "prompt_for": "batch"}, {}),
        (PICTURES, {}, {"lora": {"rank": 4}, "trainable": ["lora"]}),
        ({"sources": [{"path": "p", "captions": "blip", "max_words": 5, "caption_prompt": "a"}]}, {}, {}),
    ],
    ids=str,
)
def test_what_is_read_or_says_what_happens_anyway_or_comes_from_compat_is_taken(
    data: dict[str, Any], stage: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert made(data, stage, **changes).stages


def test_a_recipe_with_compat_is_read_again_as_it_was_printed() -> None:
    recipe = made(PICTURES, {"steps_per_epoch": 5}, compat="original")
    printed = recipe.model_dump(mode="json", exclude_unset=True)

    assert make_recipe(printed, Path("printed")) == recipe
