"""`minigpt4 train` and `minigpt4 train plot`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from minigpt4.cli.console import note, quiet
from minigpt4.cli.options import Options, app, examples
from minigpt4.cli.progress import counting_bar, parts_bar, training_bar
from minigpt4.errors import UsageError

if TYPE_CHECKING:
    from minigpt4.training.recipe import Recipe


_COMMAND = ["train", "plot"]


@app.command(
    epilog=examples(
        "minigpt4 train recipes/nano-stage1.yaml --set output=runs/mine --set stages.0.steps=100",
        "minigpt4 train --cfg-path train_configs/minigpt4_stage1_pretrain.yaml --dry-run",
    )
)
def train(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    cfg_path: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="One of the original's train YAML files, not a recipe.")
    ] = None,
    options: Options = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe, train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the run began with another recipe.")] = False,
) -> None:
    """Train, or go on with what was interrupted."""
    if (recipe is None) == (cfg_path is None):
        raise UsageError(
            "train needs a RECIPE.yaml, or --cfg-path with one of the original's train YAML files"
            if recipe is None
            else "train takes a RECIPE.yaml or --cfg-path, not both",
            "recipes/ in the source tree holds recipes",
        )
    if recipe is not None:
        if options:
            raise UsageError("--options changes keys of a YAML of the original's, and there is none", "use --set")
        from minigpt4.training.recipe import read_recipe

        settings = read_recipe(recipe, overrides)
    else:
        if overrides:
            raise UsageError(
                "--set changes keys of a recipe, and --cfg-path names a YAML of the original's",
                "use --options, or print the recipe with --dry-run and train that",
            )
        settings = _from_the_original(Path(cfg_path or ""), options or [], dry_run=dry_run)
    if dry_run:
        content = settings.model_dump(mode="json", exclude_unset=True)
        print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), end="")
        return
    quiet(hub=_needs_the_hub(settings))
    from minigpt4.training.run import Reports, run

    with training_bar() as update, parts_bar() as parts, counting_bar("picture") as features, counting_bar() as sources:
        folder = run(settings, Reports(update, parts, features, sources, note), force=force)
    if _speaks():
        print(folder)


def _from_the_original(cfg_path: Path, options: list[str], *, dry_run: bool) -> "Recipe":
    """Translate a train YAML, and make the model folder of the files that it names."""
    quiet()
    from minigpt4.training.original import has_cuda, own_folder, recipe_from_original
    from minigpt4.training.recipe_yaml import is_recipe
    from minigpt4.weights.original.yaml import read_original_yaml

    if is_recipe(cfg_path):
        raise UsageError(f"{cfg_path} is a recipe, none of the original's YAML files", f"minigpt4 train {cfg_path}")
    read = read_original_yaml(cfg_path, options)
    if dry_run:
        settings, notes = recipe_from_original(read)
    else:
        settings, notes = recipe_from_original(read, cuda=has_cuda(), check_files=True)
        if own_folder(read) is None:
            from minigpt4.weights.original.prepare import prepare_original

            with parts_bar() as report:
                found = prepare_original(cfg_path, options, report=report, training=True)
            settings = settings.model_copy(update={"model": str(found.folder), "quantize": found.quantize})
            notes = [*notes, *found.notes, f"model: {found.folder}"]
    if _speaks():
        for sentence in notes:
            note(sentence)
    return settings


def _needs_the_hub(settings: "Recipe") -> bool:
    """Tell whether a recipe names a model or data of a hub."""
    from minigpt4.weights.hub import is_on_hub

    model = settings.model
    names = [model] if isinstance(model, str) else [model.vision_model, model.language_model]
    return any(is_on_hub(name) for name in names) or "'hub:" in str(settings.data)


def _speaks() -> bool:
    """Whether this is the one of torchrun's processes that tells the others' news."""
    return os.environ.get("RANK", "0") == "0"


@app.command(
    name=" ".join(_COMMAND),
    epilog=examples("minigpt4 train plot runs/nano", "minigpt4 train plot runs/nano --output curves.png"),
)
def plot(
    run_folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="Else metrics.png in the folder.")
    ] = None,
) -> None:
    """Draw the curves of a run, finished or not."""
    from minigpt4.training.reports import plot_metrics

    print(plot_metrics(run_folder, output))


def join_names(arguments: list[str]) -> list[str]:
    """Make one name of `train plot`: a command beside `train`, whose own first argument is a recipe."""
    return [" ".join(_COMMAND), *arguments[2:]] if arguments[:2] == _COMMAND else arguments
