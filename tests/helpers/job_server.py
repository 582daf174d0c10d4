"""Fake job server of a Ray head: serves Ray's own client over HTTP and records the requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSCloseCode, web

JOB = "raysubmit_test"


@dataclass
class JobServer:
    """Behaviour of the server and the requests it received.

    Attributes:
        token: required in every request; None: no authentication.
        log: output of the job.
        status: final status of the job.
        cuts: number of characters after which each of the first log connections breaks.
        paths: method and path of every request.
        uploaded, jobs: bodies of the package uploads and of the job submissions.
    """

    token: str | None = None
    log: str = "hello\nworld\n"
    status: str = "SUCCEEDED"
    cuts: list[int] = field(default_factory=list)
    address: str = ""
    paths: list[str] = field(default_factory=list)
    uploaded: list[bytes] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)

    async def version(self, request: web.Request) -> web.Response:
        import ray

        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    async def package(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.Response(status=404)
        self.uploaded.append(await request.read())
        return web.Response()

    async def submit(self, request: web.Request) -> web.Response:
        self.jobs.append(await request.json())
        return web.json_response({"job_id": JOB, "submission_id": JOB})

    async def info(self, request: web.Request) -> web.Response:
        status = "RUNNING" if self.cuts else self.status
        return web.json_response({"type": "SUBMISSION", "entrypoint": "x", "status": status, "submission_id": JOB})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = self.log
        if self.cuts:
            await socket.send_str(text[: self.cuts.pop(0)])
            # A broken connection has no closing handshake.
            assert request.transport is not None
            request.transport.close()
            return socket
        for begin in range(0, len(text), 3):
            await socket.send_str(text[begin : begin + 3])
        await socket.close(code=WSCloseCode.OK)
        return socket


@contextlib.contextmanager
def job_server(**behaviour: Any) -> Iterator[JobServer]:
    """Run a server on loopback in a thread; ``behaviour`` are the fields of ``JobServer``."""
    server = JobServer(**behaviour)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        server.paths.append(f"{request.method} {request.path}")
        if server.token and request.headers.get("Authorization") != f"Bearer {server.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def start() -> None:
        app = web.Application(middlewares=[guard], client_max_size=2**30)
        app.router.add_get("/api/version", server.version)
        app.router.add_route("*", "/api/packages/{protocol}/{name}", server.package)
        app.router.add_post("/api/jobs/", server.submit)
        app.router.add_get("/api/jobs/{job}", server.info)
        app.router.add_get("/api/jobs/{job}/logs/tail", server.tail)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.address = f"http://{host}:{port}"
        ready.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
