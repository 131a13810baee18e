"""uvicorn with this application's limits: Server(app, worker).run(sockets=[sock])."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

from kdc_edge.serve.worker import Worker


class Server(uvicorn.Server):
    """Ends by a signal; every client gets an answer before, without waiting for the step in work."""

    def __init__(self, app: Starlette, worker: Worker) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, limit_concurrency=256, timeout_keep_alive=10,
                h11_max_incomplete_event_size=64 * 1024, timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.end()
        await super().shutdown(sockets)
