"""The command that trains nano, or goes on with what was interrupted: `python -m nano.train nano/recipe.yaml`."""

import argparse
import sys
from pathlib import Path

from minigpt4.cli.console import complain, note, quiet
from minigpt4.cli.progress import parts_bar, training_bar
from minigpt4.errors import MiniGPT4Error


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m nano.train", description="Train nano, or go on.")
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key")
    parser.add_argument("--force", action="store_true", help="go on although the run began with another recipe")
    options = parser.parse_args()
    quiet()
    from minigpt4.training.recipe import read_recipe
    from minigpt4.training.run import Reports
    from nano.run import NanoRecipe, train

    try:
        recipe = read_recipe(options.recipe, options.set, NanoRecipe)
        with training_bar() as update, parts_bar() as parts:
            print(train(recipe, Reports(update=update, parts=parts, say=note), force=options.force))
    except MiniGPT4Error as error:
        complain(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
