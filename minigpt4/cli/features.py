"""`minigpt4 data features`: letting the frozen parts look at the pictures before training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from minigpt4.cli.app import data_app, examples
from minigpt4.cli.data import counting_bar
from minigpt4.cli.terminal import note, parts_bar, quiet
from minigpt4.text import counted


@data_app.command(
    epilog=examples(
        "minigpt4 data features recipes/minigpt4-stage2.yaml --set data.crop=false",
    )
)
def features(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
) -> None:
    """Compute what a recipe with `features: cache` reads, and print where it is kept."""
    quiet()
    from minigpt4.training.features import compute_features
    from minigpt4.training.model_setup import check_libraries, prepare_model
    from minigpt4.training.processes import joined
    from minigpt4.training.recipe import read_recipe
    from minigpt4.training.stage_data import RunSources, check_data

    settings = read_recipe(recipe, overrides)
    check_libraries(settings)
    with joined() as here:
        with features_bar() as report, counting_bar() as reading:
            sources = RunSources(reading if here.is_main_process else None)
            check_data(settings, sources)
            with parts_bar() as report_parts:
                prepared = prepare_model(settings, here, report_parts)
            folder, counts = compute_features(settings, prepared, here, report, sources)
        if here.is_main_process:
            known = counted(counts.known, "record")
            note(f"{counted(counts.computed, 'picture')} computed, {known} had theirs, {counts.bad:,} bad")
            if settings.features != "cache":
                note("the recipe says features: compute, so train does not read them: set features=cache there")
            print(folder)


def features_bar() -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Show pictures looked at, how many a second and the time left: a bar on a terminal, else a line now and then."""
    return counting_bar("picture")
