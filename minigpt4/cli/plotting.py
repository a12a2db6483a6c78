"""`minigpt4 train plot`."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt4.cli.app import app, examples

_COMMAND = ["train", "plot"]


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
