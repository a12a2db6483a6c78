"""`minigpt4 demo`."""

from typing import Any

from minigpt4.cli.app import app, examples
from minigpt4.cli.serving import run_server, takes_server_options


@app.command(
    epilog=examples(
        "minigpt4 demo",
        "minigpt4 demo --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0",
        "minigpt4 demo --host 0.0.0.0 --api-key-file key.txt",
    )
)
@takes_server_options
def demo(**options: Any) -> None:
    """Serve the API and a web page to talk about pictures on; open the address it prints in a browser."""
    from minigpt4.serving.page import read_page

    run_server(**options, page=read_page())
