"""The original's train YAMLs as recipes: every key is mapped, ignored with a sentence, or refused with its line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4.errors import ConfigError
from minigpt4.training.original import recipe_from_original
from minigpt4.training.recipe import Recipe, SourcesData, read_recipe
from minigpt4.weights.original.yaml import read_original_yaml
from tests import golden
from tests.weights.original.original_yamls import STAGE_1, STAGE_2, write_tree

PROJECT = Path(__file__).resolve().parents[2]
STAGE_1_YAML, STAGE_2_YAML = "minigpt4_stage1_pretrain.yaml", "minigpt4_stage2_finetune.yaml"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An original tree, and the working directory in it."""
    monkeypatch.chdir(write_tree(tmp_path))
    return tmp_path


def translated(name: str, *options: str, **settings: Any) -> tuple[Recipe, str]:
    read = read_original_yaml(Path("train_configs") / name, options)
    recipe, notes = recipe_from_original(read, **settings)
    return recipe, "\n".join(notes)


def sources(recipe: Recipe) -> SourcesData:
    assert isinstance(recipe.data, SourcesData)
    return recipe.data


@pytest.mark.parametrize(
    ("yaml_name", "recipe_name"), [(STAGE_1_YAML, "minigpt4-stage1.yaml"), (STAGE_2_YAML, "minigpt4-stage2.yaml")]
)
def test_tutorials_yaml_says_what_our_recipe_says(yaml_name: str, recipe_name: str, tree: Path) -> None:
    theirs, _ = translated(yaml_name)
    ours = read_recipe(PROJECT / "recipes" / recipe_name)

    def compared(recipe: Recipe) -> dict[str, Any]:
        content = recipe.model_dump(exclude={"model", "output", "checkpoint_steps"})
        for place in (*content["stages"], *content["data"]["sources"]):
            place.pop("name", None)
            place.pop("path", None)
        return content

    assert compared(theirs) == compared(ours)
    assert theirs.compat == "original"


def test_stage_1_has_the_published_numbers(tree: Path) -> None:
    recipe, _ = translated(STAGE_1_YAML, check_files=True)
    stage = recipe.stages[0]
    assert (stage.steps, stage.batch_size, stage.accumulation, stage.steps_per_epoch) == (20000, 64, 1, 5000)
    assert (stage.learning_rate, stage.final_learning_rate, stage.warmup_learning_rate) == (1e-4, 8e-5, 1e-6)
    assert (stage.warmup_steps, stage.weight_decay, stage.betas) == (5000, 0.05, (0.9, 0.999))
    assert (stage.max_text_tokens, stage.end_symbol, stage.layout, stage.mix) == (32, "\n", "original", "batches")
    assert (recipe.seed, recipe.workers, recipe.output) == (42, 4, Path("output/minigpt4_stage1_pretrain"))
    assert [(s.path, s.format, s.share) for s in sources(recipe).sources] == [
        ("data/laion_dataset", "shards", 115), ("data/cc_sbu_dataset", "shards", 14)
    ]  # fmt: skip
    assert (sources(recipe).prompts, sources(recipe).crop) == ([], True)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tree: Path) -> None:
    path = tree / "prompts/alignment.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    recipe, _ = translated(STAGE_2_YAML, check_files=True)

    prompts = sources(recipe).prompts
    assert isinstance(prompts, list) and prompts[0].startswith("<Img>")


def test_stage_2_asks_with_the_prompts_of_its_file(tree: Path) -> None:
    recipe, notes = translated(STAGE_2_YAML, check_files=True)
    prompts = sources(recipe).prompts
    assert isinstance(prompts, list)
    assert len(prompts) == 4
    assert prompts[0] == "<Img><ImageHere></Img> Describe this image in detail."
    stage = recipe.stages[0]
    assert (stage.prompt_template, stage.end_symbol) == ("###Human: {} ###Assistant: ", "###")
    assert (stage.max_text_tokens, stage.steps, stage.prompt_for) == (160, 1000, "batch")
    assert "the 4 prompts of" in notes


def test_prompts_without_a_place_for_the_picture_are_left_out_and_counted(tree: Path) -> None:
    with (tree / "prompts/alignment.txt").open("a", encoding="utf-8") as file:
        file.write("no picture here\n\n")
    recipe, notes = translated(STAGE_2_YAML)
    prompts = sources(recipe).prompts
    assert isinstance(prompts, list)
    assert len(prompts) == 4
    assert "lines without <ImageHere> are left out: 1" in notes


def test_without_a_template_the_picture_stands_alone(tree: Path) -> None:
    recipe, notes = translated(STAGE_2_YAML, "model.prompt_template=''")
    assert sources(recipe).prompts == []
    assert "every prompt is empty" in notes


@pytest.mark.parametrize("name", [STAGE_1_YAML, STAGE_2_YAML])
def test_every_key_is_named_in_a_sentence(name: str, tree: Path) -> None:
    read = read_original_yaml(Path("train_configs") / name)
    _, notes = translated(name)
    told = notes.replace(",", " ").replace(":", " ").replace("(", " ").replace(")", " ").split()
    said = {word.rpartition(".")[2] for word in told} | set(told)
    for key in read.settings:
        if key[0] != "preprocess" and key[-1] != "image_size":
            assert key[-1] in said, key
    assert "preprocess" in said


@pytest.mark.parametrize("name", [STAGE_1_YAML, STAGE_2_YAML])
def test_recorded_configurations_are_translated(name: str) -> None:
    recipe, notes = recipe_from_original(read_original_yaml(golden.ROOT / "configs" / name))
    assert recipe.stages[0].steps == (20000 if "stage1" in name else 1000)
    assert any("a run needs --options datasets." in note for note in notes)
    if "stage2" in name:
        recorded = golden.content("golden/prompt_wrap.json")
        template = recipe.stages[0].prompt_template
        assert template == recorded["prompt_template"]
        assert [template.replace("{}", prompt) for prompt in sources(recipe).prompts] == recorded["prompt_list"]


def test_recipe_is_read_again_as_it_was_written(tree: Path) -> None:
    recipe, _ = translated(STAGE_2_YAML, "run.accum_grad_iters=3", "run.init_lr=1e-7", r'model.end_sym="\n###"')
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    assert read_recipe(Path("recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("accumulation", "steps", "sentence"),
    [(1, 1000, "steps: 1000"), (4, 250, "4 batches make one"), (3, 330, "2 left over at an epoch's end")],
)
def test_steps_are_updates_and_epochs_are_batches(accumulation: int, steps: int, sentence: str, tree: Path) -> None:
    recipe, notes = translated(STAGE_2_YAML, f"run.accum_grad_iters={accumulation}")
    stage = recipe.stages[0]
    assert (stage.steps, stage.steps_per_epoch, stage.warmup_steps) == (steps, 200, 200)
    assert stage.accumulation == accumulation
    assert sentence in notes


def test_what_is_missing_is_the_originals_default(tree: Path) -> None:
    left_out = ("warmup_lr:", "warmup_steps:", "amp:", "iters_per_epoch:", "sample_ratio:", "evaluate:")
    kept = [line for line in STAGE_1.splitlines() if not line.strip().startswith(left_out)]
    text = "\n".join(kept)
    (tree / "train_configs/few.yaml").write_text(text, encoding="utf-8")
    recipe, notes = translated("few.yaml")
    stage = recipe.stages[0]
    assert (stage.warmup_steps, stage.warmup_learning_rate) == (0, -1)
    assert (stage.steps_per_epoch, stage.steps, recipe.precision) == (10000, 40000, "fp32")
    assert {source.share for source in sources(recipe).sources} == {1.0}
    assert "run.iters_per_epoch: missing" in notes


@pytest.mark.parametrize(
    ("options", "cuda", "precision", "sentence"),
    [
        ([], True, "fp16", "as in the original"),
        ([], None, "fp16", "where there is no CUDA device a run takes fp32"),
        ([], False, "fp32", "fp16 needs a CUDA device"),
        (["run.device=cpu"], True, "fp32", "fp16 needs a CUDA device"),
        (["run.amp=False"], True, "fp32", "without scaling"),
    ],
)  # fmt: skip
def test_mixed_precision_is_the_originals_where_it_can_be(
    options: list[str], cuda: bool | None, precision: str, sentence: str, tree: Path
) -> None:
    recipe, notes = translated(STAGE_1_YAML, *options, cuda=cuda)
    assert recipe.precision == precision
    assert sentence in notes


def test_trained_qformer_brings_its_queries(tree: Path) -> None:
    recipe, _ = translated(STAGE_1_YAML, "model.freeze_qformer=False")
    assert recipe.trainable == ["query_tokens", "qformer", "language_projection"]


def test_trained_vision_encoder_brings_its_norm_and_says_what_becomes_of_its_keys(tree: Path) -> None:
    recipe, notes = translated(STAGE_1_YAML, "model.freeze_vit=False", "model.vit_precision=fp32")
    assert recipe.trainable == ["vision_model", "language_projection"]
    assert "trainable is vision_model, language_projection; vision_model is all of the vision encoder" in notes
    assert "model.vit_precision: the vision encoder learns, so it is kept in float32" in notes
    assert "model.drop_path_rate: the vision encoder leaves out no layers" in notes
    assert "frozen" not in notes
    recipe, _ = translated(STAGE_1_YAML, "model.freeze_vit=False", "model.freeze_qformer=False")
    assert recipe.trainable == ["vision_model", "query_tokens", "qformer", "language_projection"]


@pytest.mark.parametrize(
    ("options", "checkpointing", "sentence"),
    [
        (["model.use_grad_checkpoint=True"], False, "frozen, so nothing of it is kept"),
        (["model.freeze_vit=False"], False, "gradient_checkpointing is False"),
        (["model.freeze_vit=False", "model.use_grad_checkpoint=True"], True, "gradient_checkpointing is True"),
        (["model.freeze_vit=False", "model.use_grad_checkpoint_llm=True"], True, "gradient_checkpointing is True"),
    ],
)  # fmt: skip
def test_vision_encoders_activations_are_computed_twice_only_where_it_learns(
    options: list[str], checkpointing: bool, sentence: str, tree: Path
) -> None:
    recipe, notes = translated(STAGE_1_YAML, *options)
    assert recipe.gradient_checkpointing is checkpointing
    assert sentence in notes


def test_layers_are_left_out_only_of_a_frozen_encoder_which_leaves_out_none(tree: Path) -> None:
    _, notes = translated(STAGE_1_YAML, "model.drop_path_rate=0.1")
    assert "model.drop_path_rate: the vision encoder is frozen and drops nothing" in notes
    with pytest.raises(ConfigError, match=r"`model\.drop_path_rate` is 0\.1, and a vision encoder that learns"):
        translated(STAGE_1_YAML, "model.drop_path_rate=0.1", "model.freeze_vit=False")


def test_other_choices_have_their_places(tree: Path) -> None:
    recipe, _ = translated(
        STAGE_1_YAML, "model.low_resource=True", "run.wandb_log=True", "model.use_grad_checkpoint_llm=True",
        "run.beta2=0.98", "run.lr_sched=linear_warmup_step_lr", "run.lr_decay_rate=0.5",
    )  # fmt: skip
    assert (recipe.quantize, recipe.report_to, recipe.gradient_checkpointing) == ("int8", ["wandb"], True)
    stage = recipe.stages[0]
    assert (stage.betas, stage.schedule, stage.decay_rate) == ((0.9, 0.98), "linear_warmup_step_lr", 0.5)


def test_pictures_are_cut_as_the_processor_says(tree: Path) -> None:
    place = "datasets.cc_sbu_align.vis_processor.train.name"
    assert sources(translated(STAGE_2_YAML)[0]).crop is True
    assert sources(translated(STAGE_2_YAML, f"{place}=blip2_image_eval")[0]).crop is False
    later, notes = translated(STAGE_2_YAML, "model.arch=minigpt4", "model.model_type=pretrain_vicuna0")
    assert sources(later).crop is False
    assert "since November 2023" in notes


def test_captions_are_cut_and_begun_as_the_text_processor_says(tree: Path) -> None:
    place = "datasets.laion.text_processor.train"
    recipe, notes = translated(STAGE_1_YAML, f"{place}.max_words=5", f"{place}.prompt='a photo of '")
    laion, cc_sbu = sources(recipe).sources
    assert (laion.captions, laion.max_words, laion.caption_prompt) == ("blip", 5, "a photo of ")
    assert (cc_sbu.captions, cc_sbu.max_words, cc_sbu.caption_prompt) == ("blip", None, None)
    assert f"{place}.max_words is max_words, {place}.prompt is caption_prompt" in notes


def test_later_files_give_the_batch_size_with_each_data_set(tree: Path) -> None:
    text = STAGE_1.replace("  batch_size_train: 64\n", "")
    text = text.replace("  laion:\n", "  laion:\n    batch_size: 16\n")
    (tree / "train_configs/later.yaml").write_text(text, encoding="utf-8")
    assert translated("later.yaml")[0].stages[0].batch_size == 16
    with pytest.raises(ConfigError, match=r"--options: `datasets\.cc_sbu\.batch_size` is 8, and datasets\.laion"):
        translated("later.yaml", "datasets.cc_sbu.batch_size=8")


def test_data_sets_are_found_in_their_own_yaml_and_among_the_options(tree: Path) -> None:
    (tree / "mine").mkdir()
    recipe, notes = translated(STAGE_1_YAML, "datasets.laion.build_info.storage=mine", check_files=True)
    assert [source.path for source in sources(recipe).sources] == ["mine", "data/cc_sbu_dataset"]
    assert "for 00000.tar to 00001.tar" in notes
    (tree / "data/laion_dataset/00001.tar").unlink()
    _, notes = translated(STAGE_1_YAML, check_files=True)
    assert "for 00000.tar to 00002.tar, 1 of which are not there" in notes


def test_data_set_with_no_share_is_left_out(tree: Path) -> None:
    recipe, notes = translated(STAGE_1_YAML, "datasets.laion.sample_ratio=0", check_files=True)
    assert [source.path for source in sources(recipe).sources] == ["data/cc_sbu_dataset"]
    assert "datasets.laion.sample_ratio: 0, so the data set is left out" in notes


def test_folder_of_an_earlier_stage_is_the_model(tree: Path) -> None:
    (tree / "runs/alignment").mkdir(parents=True)
    recipe, notes = translated(STAGE_2_YAML, "model.ckpt=runs/alignment")
    assert Path(str(recipe.model)) == tree / "runs/alignment"
    assert "is the model" in notes


def test_only_a_run_refuses_data_that_is_not_there(tree: Path) -> None:
    missing = "datasets.cc_sbu_align.build_info.storage=none"
    recipe, notes = translated(STAGE_2_YAML, missing, "model.prompt_path=none.txt")
    assert sources(recipe).sources[0].path == "none"
    assert notes.count("a run refuses that") == 2
    with pytest.raises(ConfigError, match="names 'none', which does not exist"):
        translated(STAGE_2_YAML, missing, check_files=True)
    with pytest.raises(ConfigError, match=r"`model\.prompt_path` names 'none\.txt', which does not exist"):
        translated(STAGE_2_YAML, "model.prompt_path=none.txt", check_files=True)
    placeholder = "datasets.cc_sbu_align.build_info.storage=/path/to/cc_sbu_align/"
    with pytest.raises(ConfigError, match="is still the placeholder"):
        translated(STAGE_2_YAML, placeholder, check_files=True)
    (tree / "minigpt4/configs/datasets/cc_sbu/align.yaml").unlink()
    with pytest.raises(ConfigError, match=r"gives no datasets\.cc_sbu_align\.build_info\.storage"):
        translated(STAGE_2_YAML, check_files=True)


def test_shards_that_a_range_leaves_out_are_refused(tree: Path) -> None:
    (tree / "data/laion_dataset/00003.tar").touch()
    with pytest.raises(ConfigError, match=r"line 5: .* leaves out 00003\.tar, which lies in .*/data/laion_dataset"):
        translated(STAGE_1_YAML)
    for shard in (tree / "data/laion_dataset").iterdir():
        shard.rename(shard.with_name("other" + shard.name))
    with pytest.raises(ConfigError, match="holds none of them"):
        translated(STAGE_1_YAML)


@pytest.mark.parametrize(
    ("old", "new", "blamed", "message"),
    [
        ("  freeze_vit: True", "  freeze_vit: maybe", "freeze_vit", "expected True or False"),
        ("  laion:", "  laion2b:", 'name: "blip2_image_train"', "the data set `laion2b` is not one of MiniGPT-4's"),
        ("    sample_ratio: 115\n", "", "sample_ratio: 14", "is there, and laion has none"),
        ("sample_ratio: 115", "sample_ration: 115", "sample_ratio: 14", "is there, and laion has none"),
        ("sample_ratio: 115", "sample_ratio: 115\n    ratio: 1", "    ratio: 1", "`datasets.laion.ratio` is not known"),
        ("sample_ratio: 115", "sample_ratio: -1", "sample_ratio: -1", "is -1, expected a number from 0"),
        (
            'name: "blip_caption"\n    sample_ratio: 115',
            'name: "blip_caption"\n        max_words: 0\n    sample_ratio: 115', "max_words: 0",
            "is 0, expected a whole number from 1",
        ),
        ("task: image_text_pretrain", "task: vqa", "task", "expected 'image_text_pretrain'"),
        ("linear_warmup_cosine_lr", "cosine", "lr_sched", "expected linear_warmup_cosine_lr or linear_warmup_step_lr"),
        ("linear_warmup_cosine_lr", "linear_warmup_step_lr", "", "`run.lr_decay_rate` is missing"),
        (
            '"linear_warmup_cosine_lr"', "linear_warmup_step_lr\n  lr_decay_rate: 0", "lr_decay",
            "is 0, expected a number above",
        ),
        (
            '"linear_warmup_cosine_lr"', "linear_warmup_step_lr\n  lr_decay_rate: 2", "lr_decay",
            "is 2, expected a number above",
        ),
        ("init_lr: 1e-4", "init_lr: fast", "init_lr", "`run.init_lr` is 'fast', expected a number from 0"),
        ("init_lr: 1e-4", "init_lr: 0", "init_lr", "nothing would be learnt"),
        ("  min_lr: 8e-5\n", "", "", "`run.min_lr` is missing, expected a number from 0"),
        ("max_epoch: 4", "max_epoch: 0", "max_epoch", "is 0, expected a whole number from 1"),
        ("max_epoch: 4", "max_epoch: 0.5", "max_epoch", "is 0.5, expected a whole number from 1"),
        ("  max_epoch: 4", "  max_epoch: 4\n  accum_grad_iters: 6000", "accum_grad", "an epoch has 5000 batches"),
        ("output_dir: ", "job_name: ", "", "`run.output_dir` is missing"),
        ("resume_ckpt_path: null", "resume_ckpt_path: c.pth", "resume_ckpt", "is 'c.pth', expected null"),
        ("evaluate: False", "evaluate: True", "evaluate", "is True, expected False"),
        ('["train"]', '["train", "val"]', "train_splits", "expected ['train']"),
        ('device: "cuda"', 'device: "tpu"', "device", "expected cuda or cpu"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say_is_refused_with_file_key_and_line(
    old: str, new: str, blamed: str, message: str, tree: Path
) -> None:
    assert STAGE_1.count(old) == 1
    text = STAGE_1.replace(old, new)
    (tree / "train_configs" / STAGE_1_YAML).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        translated(STAGE_1_YAML)
    assert message in error.value.message
    assert error.value.hint
    assert f"train_configs/{STAGE_1_YAML}" in error.value.message
    if blamed:
        line = next(number for number, line in enumerate(text.splitlines(), 1) if blamed in line)
        assert f", line {line}: " in error.value.message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.max_txt_len=1", "is 1, expected a whole number from 2"),
        ("model.prompt_template='###Human: ###'", "expected one {} for the prompt"),
        ("model.prompt_template='{} {}'", "expected one {} for the prompt"),
        ("model.prompt_template='{a} {}'", "expected one {} for the prompt"),
        ("model.prompt_template='} {}'", "expected one {} for the prompt"),
        ("model.end_sym=''", "is empty, so no end would be learnt"),
        ("run.seed=9223372036854775808", "expected a whole number up to 9223372036854775807"),
        ("run.max_epoch=10000000000", "is 10000000000, expected a whole number up to 1000000000"),
        ("run.init_lr=.inf", "`run.init_lr` is inf, expected a finite number from 0"),
        ("run.warmup_lr=-.inf", "`run.warmup_lr` is -inf, expected a finite number"),
        ("run.weight_decay=.nan", "`run.weight_decay` is nan, expected a finite number from 0"),
        ("datasets.cc_sbu_align.vis_processor.train.min_scale=0.2", "is 0.2, expected 0.5"),
        ("datasets.cc_sbu_align.text_processor.train.name=blip_question", "expected 'blip_caption'"),
        ("datasets.cc_sbu_align.build_info.storage=data/{a,b}/x.tar", "expected a folder, a .tar or DIR/"),
        ("datasets.cc_sbu_align.build_info.storage=[a, b]", "expected a path"),
        ("datasets.cc_sbu_align.sample_ratio=0", "is 0 for every data set"),
        ("datasets.cc_sbu_align=5", "`datasets.cc_sbu_align` has a value"),
        ("run.beta2=1.0", "expected a number below 1"),
        ("run.runner=runner_iter", "expected 'runner_base'"),
        ("run.num_workers=-1", "is -1, expected a whole number from 0"),
    ],
)  # fmt: skip
def test_wrong_option_is_refused_as_one(option: str, message: str, tree: Path) -> None:
    with pytest.raises(ConfigError) as error:
        translated(STAGE_2_YAML, option)
    assert message in error.value.message
    assert "--options" in error.value.message
    assert error.value.hint


def test_a_value_of_another_kind_is_told_with_what_to_write(tree: Path) -> None:
    text = STAGE_2.replace("seed: 42", "seed: some")
    (tree / "train_configs" / STAGE_2_YAML).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"`run\.seed` is 'some', expected a whole number from 0$") as told:
        translated(STAGE_2_YAML)
    assert told.value.hint == "write a whole number from 0 there, or override it: --options run.seed=VALUE"
    with pytest.raises(ConfigError, match=r"--options: `run\.seed` is -1, expected a whole number from 0$") as told:
        translated(STAGE_2_YAML, "run.seed=-1")
    assert told.value.hint == "write a whole number from 0"


def test_data_sets_that_treat_pictures_differently_are_refused(tree: Path) -> None:
    with pytest.raises(ConfigError, match="differs from that of laion"):
        translated(STAGE_1_YAML, "datasets.cc_sbu.vis_processor.train.name=blip2_image_eval")


def test_prompts_that_cannot_be_used_are_refused(tree: Path) -> None:
    (tree / "prompts/alignment.txt").write_text("Describe it.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 8: .* where no line has <ImageHere>"):
        translated(STAGE_2_YAML)
    (tree / "prompts/alignment.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="line 8: cannot read the prompts"):
        translated(STAGE_2_YAML)


def test_yaml_without_data_sets_is_refused(tree: Path) -> None:
    text = STAGE_2[: STAGE_2.index("datasets:")] + STAGE_2[STAGE_2.index("run:") :]
    (tree / "train_configs/none.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="names no data sets"):
        translated("none.yaml")


def test_mistake_in_a_data_sets_own_yaml_names_that_file(tree: Path) -> None:
    own = tree / "minigpt4/configs/datasets/cc_sbu/align.yaml"
    own.write_text("datasets:\n  cc_sbu:\n    build_info:\n      storage: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cc_sbu/align\.yaml, line 4: `datasets\.cc_sbu\.build_info\.storage`"):
        translated(STAGE_2_YAML)
