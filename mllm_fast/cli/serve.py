"""The command `mllm-fast serve`: an HTTP server for OpenAI's clients."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from ..core.extras import install_command
from .options import ERR, Backend, Device, Dtype, MaxPixels, Model, load, load_joint, parse_keep

_NEEDED = {"fastapi": "serve", "uvicorn": "serve", "httptools": "serve", "prometheus_client": "serve", "httpx": "serve"}


def serve(  # long: the options of a command are its parameters
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one, which the log tells.")] = 8000,
    keep: Annotated[
        str, typer.Option(help="Image tokens that contexts keep unless a request says so: 5%, 29, or off.")
    ] = "5%",
    store: Annotated[
        str | None, typer.Option(help="Folder or URL of contexts that outlive the server; none: in memory alone.")
    ] = None,
    memory: Annotated[int, typer.Option(help="MiB of contexts held in memory.")] = 1024,
    disk: Annotated[int, typer.Option(help="MiB of contexts in the store.")] = 10240,
    storage: Annotated[str, typer.Option(help="How contexts are stored: full, or int8.")] = "full",
    api_keys: Annotated[
        Path | None, typer.Option(help="File of bearer keys, one a line; MLLM_FAST_API_KEYS may hold some too.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="What requests call the model; --model if not given.")] = None,
    max_batch: Annotated[int, typer.Option(help="Answers decoded together.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; beyond it 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Longest answer that may be asked for, in tokens.")] = 1024,
    max_body: Annotated[int, typer.Option(help="Largest request, in MiB.")] = 32,
    max_client_requests: Annotated[int, typer.Option(help="Requests of one key that are taken at once.")] = 128,
    max_connections: Annotated[
        int | None, typer.Option(help="Connections; by default as many as the process may open, up to 4096.")
    ] = None,
    client_connections: Annotated[
        int | None, typer.Option(help="Connections of one address; half of all by default. Raise it behind a proxy.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that an answer may take, its wait included.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds in which the server stops, whatever it does.")] = 30.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help='Origin of web pages whose scripts may use the server: "https://app.example.org".'),
    ] = None,
    allow_remote: Annotated[
        list[str] | None, typer.Option(help='Host whose images may be fetched by https: "cdn.example.org".')
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="The tool in the browser as well, at /ui.")] = False,
    joint: Annotated[
        str | None, typer.Option(help="With --ui: a joint model's folder, for a detector's boxes; 'shapes' has one.")
    ] = None,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    max_pixels: MaxPixels = 25_000_000,
    quiet: Annotated[bool, typer.Option("--quiet", help="No log of requests.")] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's chat completions, contexts, explanations and metrics.

    An image is read once, and later questions about it use its context.
    Without API keys, everybody who reaches the address may use the server.
    SIGINT (Ctrl-C) and SIGTERM stop it: requests in progress have a third of the time of grace to finish.
    """
    needed = _NEEDED | ({"gradio": "ui"} if ui else {})
    for name, extra in needed.items():
        if importlib.util.find_spec(name) is None:
            raise InputError(f"serve needs {name}: {install_command(extra)}")
    if joint is not None and not ui:
        raise InputError("--joint is for the tool in the browser: give --ui too")
    if not 0 <= port < 65536:
        raise InputError(f"--port is 0 to 65535, got {port}")
    from ..serving.auth import ApiKeys
    from ..serving.connections import Connections
    from ..serving.logs import Log
    from ..serving.server import application
    from ..serving.server import serve as listen
    from ..serving.settings import MIB, Settings

    settings = Settings(
        keep=None if keep == "off" else parse_keep(keep),
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_tokens,
        default_tokens=min(256, max_tokens),
        max_body=max_body * MIB,
        max_client_bodies=max(128, max_body) * MIB,
        max_bodies=max(256, 2 * max_body) * MIB,
        max_pixels=max_pixels,
        max_client_requests=max_client_requests,
        time_limit=time_limit,
        grace=grace,
        store=store,
        memory_bytes=memory * MIB,
        disk_bytes=disk * MIB,
        storage=storage,
        remote_hosts=tuple(one.lower() for one in allow_remote or []),
    )
    keys = ApiKeys.find(api_keys)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        ERR.print("[yellow]no API keys are set: whoever reaches this address may ask[/]", highlight=False)
    both = None if joint is None else load_joint(joint, device, dtype, max_pixels, backend)
    vlm = load(model, device, dtype, max_pixels, backend) if both is None else both.vlm
    log = Log(None) if quiet else Log()
    app, service = application(vlm, settings, keys, served_name or model, log, allow_origin or ())
    if ui:
        from ..serving.ui import mount
        from ..serving.ui_backend import UIBackend

        app = mount(app, UIBackend(service, both), keys, log)
    code = listen(app, service, log, host, port, Connections(max_connections, client_connections), own_process=True)
    if code:
        raise typer.Exit(code)
