"""The HTTP side: one page, images in the shape of OpenAI's images interface, progress as Server-Sent Events.

    GET  /                         the page
    POST /v1/images/generations    {"prompt": ..., "n": 1, "size": "512x512", "response_format": "b64_json"}
                                   and diffusers' names: seed, num_inference_steps, guidance_scale, negative_prompt,
                                   scheduler; "stream": true answers with events `step`, `image`, `done`, `error`
    POST /v1/images/edits          the same with "image", "mask" (base64 or data URLs) and "strength"
    GET  /v1/models  /health  /metrics

Everything from outside is bounded: bodies, prompts, images, steps, sizes, waiting jobs, and the time a client has to
send its body. Browsers of other origins are refused, since a page anywhere could otherwise use the machine.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from urllib.parse import urlsplit

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from kdc_edge.errors import InputError
from kdc_edge.image import encode_png, preview
from kdc_edge.request import Request as ImageRequest
from kdc_edge.samplers import SAMPLERS
from kdc_edge.serve.body import DEFAULT_LIMITS, Body, EditBody, Limits
from kdc_edge.serve.worker import Busy, Done, Event, Failed, Finished, Job, Step, Worker
from kdc_edge.text import invalid_field, printable
from kdc_edge.version import __version__

MAX_BODY_BYTES = 64 * 1024
MAX_EDIT_BYTES = 16 * 2**20  # of a body with an image and a mask
MAX_EDITS = 4  # bodies with images that are read at once
BODY_SEC = 10.0  # that a client has to send its body
RETRY_SEC = 5
MAX_PENDING_STEPS = 4  # events of steps that wait for a slow client; older ones are worth nothing
Handler = Callable[[Request], Awaitable[Response]]
Asked = tuple[Body, list[ImageRequest], str]  # with a note for the client, "" where there is nothing to say


def make_app(
    worker: Worker, *, limits: Limits = DEFAULT_LIMITS, token: str | None = None, hosts: frozenset[str] = frozenset()
) -> Starlette:
    """The application. `token` is asked for as a bearer where given; `hosts` are names besides localhost's."""
    server = _Server(worker, limits)
    guard = _Guard(token, hosts)
    routes = [
        Route("/", guard.open(server.page)),
        Route("/health", guard.open(server.health)),
        Route("/metrics", guard(server.metrics)),
        Route("/v1/models", guard(server.models)),
        Route("/v1/images/generations", guard(server.generate), methods=["POST"]),
        Route("/v1/images/edits", guard(server.edit), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})


class _Guard:
    """Who may ask: this machine's names, pages of the same origin, and holders of the token."""

    LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "testserver"})

    def __init__(self, token: str | None, hosts: frozenset[str]) -> None:
        self._token, self._hosts = token, self.LOCAL | {name.lower() for name in hosts}

    def open(self, handler: Handler) -> Handler:
        """For what holds no secret: no token is needed."""

        async def guarded(request: Request) -> Response:
            self._check_origin(request)
            return await handler(request)

        return guarded

    def __call__(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._check_origin(request)
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if self._token is not None and not hmac.compare_digest(given, self._token.encode()):
                raise HTTPException(401, "a token is needed: send Authorization: Bearer TOKEN")
            return await handler(request)

        return guarded

    def _check_origin(self, request: Request) -> None:
        """Refuse other hosts' names (DNS rebinding) and pages of other origins."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""  # in small letters
            foreign = origin is not None and urlsplit(origin).netloc != host
        except ValueError:  # a bracket that is not closed
            raise HTTPException(400, "the header Host or Origin holds no address") from None
        if "*" not in self._hosts and name not in self._hosts:
            raise HTTPException(421, f"this server is not {printable(name, 100)}: start it with --allow-host")
        if foreign:
            raise HTTPException(403, "pages of other origins may not use this server")


class _Server:
    """The handlers."""

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker, self.limits = worker, limits
        self._edits = 0  # bodies with images that are being read
        self._page = files("kdc_edge.serve").joinpath("page.html").read_text("utf-8")

    async def page(self, _request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:;"
            " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        facts = json.dumps(self._facts()).replace("<", "\\u003c")
        page = self._page.replace("{{nonce}}", nonce).replace("{{facts}}", facts)
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})

    def _facts(self) -> dict[str, object]:
        model = self.worker.pipeline.model
        unit = model.vae_scale * model.latent_unit
        (own,), _ = Body(prompt="").requests(self.worker.pipeline, self.limits)
        return {
            "name": self.worker.name, "size": model.image_size, "unit": unit, "steps": own.steps,
            "guidance": own.guidance, "maxSteps": self.limits.steps, "schedulers": list(SAMPLERS),
            "scheduler": own.sampler, "maxPixels": self.limits.pixels,
            "fixed": self.worker.pipeline.fixed_size,
        }  # fmt: skip

    async def health(self, _request: Request) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.worker.name, "object": "model"}]})

    async def metrics(self, _request: Request) -> Response:
        c = self.worker.counts
        rows = {
            "images_total": c.images, "image_seconds_total": c.image_seconds, "jobs_failed_total": c.failed,
            "jobs_cancelled_total": c.cancelled, "jobs_refused_total": c.refused,
            "jobs_waiting": self.worker.waiting, "busy": int(self.worker.busy),
        }  # fmt: skip
        lines = [f'kdc_edge_info{{version="{__version__}"}} 1', *(f"kdc_edge_{n} {v}" for n, v in rows.items())]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def generate(self, request: Request) -> Response:
        async def read() -> Asked:
            body = Body.model_validate_json(await _read(request, MAX_BODY_BYTES))
            return body, *body.requests(self.worker.pipeline, self.limits)

        return await self._answer(request, read())

    async def edit(self, request: Request) -> Response:
        async def read() -> Asked:
            if self._edits >= MAX_EDITS:
                raise Busy("too many images are being read: try again later")
            self._edits += 1
            try:
                raw = await _read(request, MAX_EDIT_BYTES)
                body = await asyncio.to_thread(EditBody.model_validate_json, raw)
                return body, *await asyncio.to_thread(body.edited, self.worker.pipeline, self.limits)
            finally:
                self._edits -= 1

        return await self._answer(request, read())

    async def _answer(self, request: Request, read: Awaitable[Asked]) -> Response:
        try:
            body, requests, note = await read
            events = _Events()
            job = self.worker.submit(requests, events.emit)
        except ValidationError as error:
            raise HTTPException(422, invalid_field(error)) from None
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except Busy as error:
            raise HTTPException(503, str(error), headers={"Retry-After": str(RETRY_SEC)}) from None
        remarks = body.remarks(note)
        if body.stream:
            return StreamingResponse(self._stream(events, job, remarks), media_type="text/event-stream")
        return await _collect(request, events, job, remarks)

    async def _stream(self, events: _Events, job: Job, remarks: dict[str, str]) -> AsyncIterator[str]:
        """Server-Sent Events until the job ends; a client that goes away cancels it."""
        try:
            async for event in events:
                yield self._as_text(event, remarks)
        finally:
            job.cancel()

    def _as_text(self, event: Event, remarks: dict[str, str]) -> str:
        if isinstance(event, Step):
            model = self.worker.pipeline.model
            small = preview(event.latents, model.vae_scale)[0]
            return _sse(
                "step", image=event.image, step=event.step, steps=event.steps, preview=_base64(encode_png(small))
            )
        if isinstance(event, Done):
            return _sse("image", image=event.image, seconds=event.seconds, **_as_item(event), **remarks)
        return _sse("error", message=event.message) if isinstance(event, Failed) else _sse("done")


class _Events:
    """Events from the worker's thread for the event loop that made this; steps are dropped while a client is slow."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        with_room = not isinstance(event, Step) or self._queue.qsize() < MAX_PENDING_STEPS
        if with_room and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Up to the last event of the job."""
        while True:
            event = await self._queue.get()
            yield event
            if isinstance(event, Finished | Failed):
                return


async def _collect(request: Request, events: _Events, job: Job, remarks: dict[str, str]) -> Response:
    """All images in one answer; a client that goes away cancels the job."""
    images: list[dict[str, object]] = []

    async def gather() -> str | None:
        async for event in events:
            if isinstance(event, Done):
                images.append(_as_item(event) | remarks)
            elif isinstance(event, Failed):
                return event.message
        return None

    gathering = asyncio.ensure_future(gather())
    try:
        while not (await asyncio.wait({gathering}, timeout=0.5))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)
    finally:
        gathering.cancel()
        job.cancel()
    if (message := gathering.result()) is not None:
        raise HTTPException(500, message)
    return JSONResponse({"created": int(time.time()), "data": images})


async def _read(request: Request, limit: int) -> bytes:
    """The body, bounded in size and time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SEC):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(413, f"the body is larger than {limit} bytes", {"Connection": "close"})
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SEC:g} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    return bytes(body)


async def _http_error(_request: Request, error: Exception) -> Response:
    """Errors in the shape of OpenAI's interface."""
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    content = {"error": {"message": printable(error.detail, 500), "type": kind}}
    return JSONResponse(content, error.status_code, headers=error.headers)


async def _fault(request: Request, _error: Exception) -> Response:
    """What nobody foresaw; uvicorn prints it."""
    return await _http_error(request, HTTPException(500, "the request could not be met; the server's log has more"))


def _sse(event: str, **data: object) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def _as_item(done: Done) -> dict[str, object]:
    """An image in OpenAI's shape; whether it was flagged, where a safety checker has looked at it."""
    flagged = {} if done.nsfw is None else {"nsfw_content_detected": done.nsfw}
    return {"b64_json": _base64(done.png), "seed": done.seed, **flagged}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
