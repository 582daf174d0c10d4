"""S3-compatible server on loopback with injectable failures, for storage tests."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import pytest

from motip.storage import paths

BUSY = b"<Error><Code>SlowDown</Code><Message>please reduce your request rate</Message></Error>"


@dataclass
class InjectedFailure:
    """The next ``left`` requests whose `METHOD /path?query` matches get a 503, or a closed connection if ``drop``."""

    pattern: str
    left: int
    drop: bool = False


class ObjectStore:
    """WSGI application that forwards requests to moto except for injected failures.

    Attributes:
        uri: address of a new bucket.
        requests: `METHOD /path?query` of all requests, prefixed by `503` or `dropped` if they failed.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.failures: list[InjectedFailure] = []
        self.requests: list[str] = []
        self.uri = f"s3://bucket-{secrets.token_hex(4)}"

    def fail(self, pattern: str, times: int, drop: bool = False) -> None:
        """Let the next ``times`` requests that match ``pattern`` fail."""
        self.failures.append(InjectedFailure(pattern, times, drop))

    def failed(self) -> list[str]:
        """The requests that failed."""
        return [request for request in self.requests if request.startswith(("503", "dropped"))]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            failure = next((each for each in self.failures if each.left and re.search(each.pattern, request)), None)
            if failure is not None:
                failure.left -= 1
            prefix = "" if failure is None else "dropped " if failure.drop else "503 "
            self.requests.append(prefix + request)
        if failure is None:
            return self._inner(environ, start_response)  # type: ignore[no-any-return]
        if failure.drop:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("dropped on purpose")
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
        return [BUSY]


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running store, with its endpoint and credentials in the environment of this process and its children."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is a test dependency")
    from werkzeug.serving import make_server

    store = ObjectStore(server_module.DomainDispatcherApplication(server_module.create_backend_app))
    # A dropped request is logged with a traceback, which is expected here.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = make_server("127.0.0.1", 0, store, threaded=True)
    server.log = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        paths.s3.cache_clear()
        pafs.S3FileSystem(
            endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir(store.uri.removeprefix("s3://"))
        yield store
    paths.s3.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()
