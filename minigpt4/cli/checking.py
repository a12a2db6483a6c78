"""The commands that look without loading a model: `minigpt4 models`."""

import json

from minigpt4.cli.app import AsJson, app, examples


@app.command(epilog=examples("minigpt4 models", "minigpt4 models --json"))
def models(as_json: AsJson = False) -> None:
    """List the models, their parts and needs."""
    from minigpt4.weights.inventory import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']}")
        for part in row["parts"]:
            licence = part["licence"] or "licence not stated"
            print(f"  {part['role']}: {part['name']}, {licence}, {part['megabytes']} MB, {part['state']}")
        print(f"  memory: about {row['memory_gigabytes']} GB; kept in {row['folder']}")
