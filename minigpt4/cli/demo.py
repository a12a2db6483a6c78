"""`minigpt4 demo`."""

from minigpt4.cli.app import app, examples
from minigpt4.cli.asking import Device, Dtype, LanguageModel, Model, Quantize
from minigpt4.cli.original import CfgPath, GpuId, Options
from minigpt4.cli.serving import (
    AllowHost,
    AllowImageHost,
    ApiKeyFile,
    Host,
    Insecure,
    MaxConcurrent,
    MaxQueue,
    Port,
    run_server,
)


@app.command(
    epilog=examples(
        "minigpt4 demo",
        "minigpt4 demo --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0",
        "minigpt4 demo --host 0.0.0.0 --api-key-file key.txt",
    )
)
def demo(
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
) -> None:
    """Serve the API and a web page to talk about pictures on; open the address it prints in a browser."""
    arguments = locals()
    from minigpt4.serving.page import read_page

    run_server(**arguments, page=read_page())
