"""The command `mllm-fast serve`: an HTTP server for OpenAI's clients."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.assets import EMBEDDED
from ..core.errors import InputError
from ..core.extras import install_command
from ..core.keep import parse_keep
from .options import (
    ERR,
    Backend,
    Device,
    Dtype,
    MaxPixels,
    Model,
    Tp,
    embedded_note,
    joint_of,
    load,
    load_joint,
    progress,
    source,
)
from .ranks import divided

if TYPE_CHECKING:
    from ..serving.logs import Log

_NEEDED = {"fastapi": "serve", "uvicorn": "serve", "httptools": "serve", "prometheus_client": "serve", "httpx": "serve"}


def serve(  # long: the options of a command are its parameters
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model, in place of --model.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one, which stderr tells.")] = 8000,
    keep: Annotated[
        str, typer.Option(help="Image tokens that contexts keep unless a request says so: 5%, 29, or off.")
    ] = "5%",
    first_answer: Annotated[
        str,
        typer.Option(
            help="What answers questions about an image while its context is being made: context (they wait for it), or"
            " whole (at once, from the whole image)."
        ),
    ] = "context",
    store: Annotated[
        str | None, typer.Option(help="Folder or URL of contexts that outlive the server; none: in memory alone.")
    ] = None,
    memory: Annotated[int, typer.Option(help="MiB of contexts held in memory.")] = 1024,
    disk: Annotated[int, typer.Option(help="MiB of contexts in the store.")] = 10240,
    storage: Annotated[str, typer.Option(help="How contexts are stored: full, or int8.")] = "full",
    api_keys: Annotated[
        Path | None, typer.Option(help="File of bearer keys, one a line; MLLM_FAST_API_KEYS may hold some too.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="What requests call the model; else its name.")] = None,
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
    tp: Tp = None,
    max_pixels: MaxPixels = 25_000_000,
    quiet: Annotated[bool, typer.Option("--quiet", help="No log; one line tells that the server is ready.")] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's chat completions, contexts, explanations and metrics.

    An image is read once, and later questions about it use its context.
    Without API keys, everybody who reaches the address may use the server.
    SIGINT (Ctrl-C) and SIGTERM stop it: requests in progress have a third of the time of grace to finish.
    """
    needed = _NEEDED | ({"gradio": "ui"} if ui else {})
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"serve needs {package}: {install_command(extra)}")
    model, joint = _models(ctx, name, model, joint, ui)
    if not 0 <= port < 65536:
        raise InputError(f"--port is 0 to 65535, got {port}")
    with progress("loading the libraries"):
        from ..serving.auth import ApiKeys
        from ..serving.connections import Connections
        from ..serving.logs import Log
        from ..serving.server import application, bind
        from ..serving.server import serve as listen
        from ..serving.settings import MIB, Settings

    settings = Settings(
        keep=None if keep == "off" else parse_keep(keep),
        first_answer=first_answer,
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
    if tp is not None and tp > 1 and (ui or joint is not None):
        raise InputError("the tool in the browser needs a model in one process: leave --ui or --tp out")
    if tp is not None and tp > 1:
        from ..serving.service import check_divided

        check_divided(settings)
    if divided(tp, device) and os.environ["RANK"] != "0":
        from ..serving.service import follow

        follow(load(model, device, dtype, max_pixels, backend, tp), settings)  # until the first process stops
        return
    keys = ApiKeys.find(api_keys)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        ERR.print("[yellow]no API keys are set: whoever reaches this address may ask[/]", highlight=False)
    with bind(host, port) as bound:  # before the model loads, which can take minutes
        log = Log(None if quiet else sys.stderr)
        if ctx.find_root().params.get("verbose") and not (quiet or ERR.is_terminal):
            log.take_over()  # what -v shows are lines of the log then
        both = None if joint is None else load_joint(joint, device, dtype, max_pixels, backend)
        vlm = load(model, device, dtype, max_pixels, backend, tp) if both is None else both.vlm
        app, service = application(vlm, settings, keys, served_name or joint or model, log, allow_origin or ())
        if ui:
            from ..serving.ui import mount
            from ..serving.ui_backend import UIBackend

            app = mount(app, UIBackend(service, both), keys, log)
        limits = Connections(max_connections, client_connections)
        if (joint or model) == EMBEDDED:
            _tell_embedded(log, quiet, "--model" if joint is None else "--joint")
        code = listen(app, service, log, bound, limits, own_process=True, ready=_ready_line(host, bound, ui))
    if code:
        raise typer.Exit(code)


def _models(ctx: typer.Context, name: str | None, model: str, joint: str | None, ui: bool) -> tuple[str, str | None]:
    """Return the model and the joint model, None if there is none, of what the options, a file and variables say."""
    if name is not None and name != model and source(ctx, "model") == 3:
        raise InputError(f"two models are given, {name} and --model {model}: give one")
    if joint is not None and not ui:
        if source(ctx, "joint") == 3:
            raise InputError("--joint is for the tool in the browser: give --ui too")
        joint = None
    if name is None:
        return model, joint_of(ctx, joint, model)
    if joint is not None and joint != name and source(ctx, "joint") == 3:
        raise InputError(f"a joint model has a language model of its own: give {name} or --joint, not both")
    return name, joint if joint == name else None


def _tell_embedded(log: Log, quiet: bool, option: str) -> None:
    """Tell what the embedded model knows: a person in a terminal, or the log."""
    if ERR.is_terminal and not quiet:
        ERR.print(embedded_note(option), style="dim", highlight=False, soft_wrap=True)
    else:
        log("embedded_model", message=embedded_note(option))


def _ready_line(host: str, bound: socket.socket, ui: bool) -> Callable[[], None]:
    """Return a function that tells on stderr that the server is ready, and where: a person, or as a line of JSON."""
    from ..serving.logs import Log

    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    if ui:
        tool = "the tool at /ui"
    elif importlib.util.find_spec("gradio") is not None:
        tool = "--ui adds the tool in the browser"
    else:
        tool = f"--ui adds the tool in the browser, after {install_command('ui')}"

    def tell() -> None:
        if ERR.is_terminal:
            ERR.print(f"ready: {url} (OpenAI API at /v1; {tool})", highlight=False, soft_wrap=True, markup=False)
        else:
            facts = {"ui": f"{url}/ui"} if ui else {"ui": None, "hint": tool}
            Log(sys.stderr)("ready", url=url, api=f"{url}/v1", **facts)

    return tell
