"""kdc-edge serve: a page and an HTTP interface in front of a resident bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdc_edge.cli.options import Device, Engine, Exact, LowMemory, Threads
from kdc_edge.cli.project import Config, best_bundle, say


def serve(
    bundle: Annotated[
        Path | None,
        Option(
            help="A bundle, a checkpoint (through torch), or hf:OWNER/NAME\\[@REVISION] of the hub; the best in"
            " bundles/ when not given."
        ),
    ] = None,
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    token: Annotated[
        str | None, Option(envvar="KDC_EDGE_TOKEN", help="Token that every request must carry; none by default.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="Another name by which clients may call this server; * for any.")
    ] = None,
    waiting: Annotated[int, Option(min=1, max=1000, help="Requests that may wait; more are refused with 503.")] = 8,
    max_images: Annotated[int, Option(min=1, max=64, help="Images a request.")] = 4,
    max_steps: Annotated[int, Option(min=1, max=1000, help="Steps an image.")] = 100,
    engine: Engine = None,
    device: Device = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    exact: Exact = False,
    config: Config = None,
) -> None:
    """Serve a page that draws while you type, and an HTTP interface in the shape of OpenAI's."""
    del config
    import socket

    from kdc_edge.errors import InputError, require
    from kdc_edge.hub import label, local
    from kdc_edge.request import Request, own_request
    from kdc_edge.runtimes import open_pipeline

    require("uvicorn", extra="serve", purpose="kdc-edge serve")
    require("starlette", extra="serve", purpose="kdc-edge serve")
    from kdc_edge.serve.app import make_app
    from kdc_edge.serve.body import Limits
    from kdc_edge.serve.server import Server
    from kdc_edge.serve.worker import Worker

    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise InputError("--token is empty, or has characters that no header carries: use ASCII without spaces")
    if host not in ("127.0.0.1", "localhost", "::1") and token is None:
        say(f"--host {host} makes the server reachable from the network: give a --token to restrict it")
    bundle = local(bundle) if bundle else None
    if bundle is None:
        bundle = best_bundle()
    pipeline = open_pipeline(bundle, engine=engine, device=device, threads=threads, low_memory=low_memory, exact=exact)
    _, note = own_request(pipeline.model, Request(""), sampler=None, steps=None, guidance=None)
    if note:
        say(note)
    worker = Worker(pipeline, name=label(bundle), waiting=waiting)
    names = frozenset(allow_host or ()) | ({"*"} if host in ("0.0.0.0", "::") and token else frozenset({host}))
    app = make_app(worker, limits=Limits(images=max_images, steps=max_steps), token=token, hosts=names)
    try:  # not by uvicorn, which prints a line of its own; who comes before the server's start waits
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]  # create_server repeats the address in brackets
        raise InputError(f"{host}:{port}: {reason}: choose another --host or --port, 0 for a free one") from None
    say(f"{page_url(host, sock.getsockname()[1], token)}  (Ctrl-C ends)")
    try:
        Server(app, worker).run(sockets=[sock])
    finally:
        worker.close()
    raise typer.Exit(0)


def page_url(host: str, port: int, token: str | None) -> str:
    """The page's address, with the token that its requests carry: "http://[::1]:8000/"."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'#token={token}' if token else ''}"
