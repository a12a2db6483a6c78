"""`minigpt4 data features`: letting the frozen parts look at the pictures before training."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt4.cli.app import data_app, examples
from minigpt4.cli.terminal import note, parts_bar, quiet

SECONDS_A_LINE = 30.0
"""Where there is no terminal, progress is told so often."""


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
    from minigpt4.training.preparing import prepare_model
    from minigpt4.training.processes import processes
    from minigpt4.training.recipe import read_recipe

    settings = read_recipe(recipe, overrides)
    here = processes()
    with parts_bar() as report_parts:
        prepared = prepare_model(settings, here, report_parts)
    with features_bar() as report:
        folder, counts = compute_features(settings, prepared, here, report)
    if here.is_main_process:
        note(f"{counts.computed:,} pictures computed, {counts.known:,} records had theirs, {counts.bad:,} bad")
        print(folder)


@contextmanager
def features_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show pictures looked at, how many a second and the time left: a bar on a terminal, else a line now and then."""
    begun: dict[str, float] = {}
    told: dict[str, float] = {}
    with ExitStack() as stack:
        bar, tasks = (_bar() if sys.stderr.isatty() else None), dict[str, Any]()
        if bar is not None:
            stack.enter_context(bar)

        def report(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            rate = done / max(now - begun.setdefault(what, now), 0.1)
            if bar is not None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total, rate=0.0)
                bar.update(tasks[what], completed=done, total=total, rate=rate)
            elif done == total or now - told.get(what, begun[what]) > SECONDS_A_LINE:
                told[what] = now
                left = "" if done == total else f", {(total - done) / max(rate, 1e-9):.0f} s left"
                note(f"{what}  {done:,} of {total:,} pictures  {rate:.1f} a second{left}")

        yield report


def _bar() -> Any:  # noqa: ANN401  (rich.progress.Progress, which loads here)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} pictures/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
