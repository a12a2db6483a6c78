"""`minigpt4 serve` and `minigpt4 demo`."""

import inspect
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4.cli.console import note
from minigpt4.cli.options import (
    CfgPath,
    Device,
    Dtype,
    GpuId,
    LanguageModel,
    Model,
    Options,
    Quantize,
    app,
    check_placement,
    examples,
    from_the_original,
    quiet_for,
)
from minigpt4.cli.progress import parts_bar
from minigpt4.errors import UsageError

if TYPE_CHECKING:
    from minigpt4.inference.engine import Engine
    from minigpt4.serving.settings import Settings


Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 127.0.0.1 is this machine alone.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Holds the key that clients must send; or MINIGPT4_API_KEY.")
]
MaxConcurrent = Annotated[int, typer.Option(min=1, max=256, help="Answers in progress at once.")]
MaxQueue = Annotated[int, typer.Option(min=1, max=10_000, help="Requests that wait; one more is refused.")]
AllowImageHost = Annotated[
    list[str] | None, typer.Option(metavar="HOST", help="Fetch pictures from there too; may be repeated.")
]
AllowHost = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A name clients use for this server, as behind a proxy.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen for other machines without a key.")]


def run_server(
    *,
    model: Model = "nano",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: ApiKeyFile = None,
    max_concurrent: MaxConcurrent = 8,
    max_queue: MaxQueue = 32,
    allow_image_host: AllowImageHost = None,
    allow_host: AllowHost = None,
    insecure: Insecure = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    language_model: LanguageModel = None,
    cfg_path: CfgPath = None,
    options: Options = None,
    gpu_id: GpuId = None,
    page: str | None = None,
) -> None:
    """Serve until a signal; what is wrong is told before the model loads.

    Its arguments are the options of `serve` and `demo`; the page is HTML for `GET /`.
    """
    check_placement(device, dtype, quantize)
    from minigpt4.serving.remote_pictures import allowed_host
    from minigpt4.serving.settings import Settings, check_exposure, is_loopback, known_hosts, read_key

    api_key = read_key(api_key_file)
    check_exposure(host, api_key, insecure=insecure)
    hosts = known_hosts(host, allow_host or [], api_key)
    image_hosts = frozenset(map(allowed_host, allow_image_host or []))
    from minigpt4.serving.server import listen

    with listen(host, port) as listening:
        quiet_for(model)
        model, device, quantize = from_the_original(
            cfg_path, options, gpu_id, model=model, device=device, quantize=quantize, language_model=language_model
        )
        name = public_name(model) if cfg_path is None else cfg_path.name
        settings = Settings(name, api_key, hosts, image_hosts)

        def load_engine() -> "Engine":
            with parts_bar() as report:
                from minigpt4.inference.engine import Engine
                from minigpt4.weights import load

                parts = load(
                    model, device=device, dtype=dtype, quantize=quantize, language_model=language_model, report=report
                )
            return Engine(*parts, max_concurrent=max_concurrent, max_queue=max_queue)

        shown, taken = listening.getsockname()[:2]
        note(f"listening on http://{f'[{shown}]' if ':' in shown else shown}:{taken}; Ctrl-C stops it")
        if api_key is None and not is_loopback(host):
            note("everybody who reaches this machine can use it: --insecure")
        _serve(listening, settings, load_engine, page)


def takes_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `run_server`, all but the page; typer reads them from its signature."""
    options = [option for option in inspect.signature(run_server).parameters.values() if option.name != "page"]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


@app.command(
    epilog=examples(
        "minigpt4 serve",
        "minigpt4 serve --host 0.0.0.0 --port 8080 --api-key-file key.txt",
        'curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" '
        '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'',
    )
)
@takes_server_options
def serve(**options: Any) -> None:
    """Answer OpenAI clients over HTTP."""
    run_server(**options)


def _serve(
    listening: socket.socket, settings: "Settings", load_engine: Callable[[], "Engine"], page: str | None
) -> None:
    """Listen, load, and answer; a model that cannot be loaded ends it."""
    from minigpt4.serving.app import make_app
    from minigpt4.serving.server import Server

    application = make_app(None, settings, page)
    failure: list[BaseException] = []

    def tell(answers: int) -> None:
        seconds = settings.limits.drain_seconds
        left = f"; answers in progress: {answers}, for {seconds:.0f} s at most; a second signal ends them at once"
        if not failure:
            note(f"stopping{left if answers else ''}")

    server = Server(application, settings, tell)

    def load_and_open() -> None:
        try:
            application.state.handler.open(load_engine())
            note(f"{settings.model_id} is ready")
        except BaseException as error:
            failure.append(error)
            server.should_exit = True

    threading.Thread(target=load_and_open, name="load", daemon=True).start()
    server.run(sockets=[listening])
    if failure:
        raise failure[0]


def public_name(model: str) -> str:
    """Return what clients call a model: never a path."""
    path = Path(model)
    if model != "nano" and (path.is_dir() or path.is_absolute() or model.startswith(".")):
        name = path.resolve().name
        if not name:
            raise UsageError(f"{model!r} is no model folder", "give the folder of a model")
        return name
    return model


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
