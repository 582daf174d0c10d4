"""Ray head for one test, started as a user does with `ray start --head`, and its processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.conftest import QUICK


@dataclass
class Head:
    """A running head.

    Attributes:
        ray: path of the `ray` command.
        address: `host:port` for RAY_ADDRESS.
        environment: of its clients; token authentication is on, RAY_ADDRESS is not set.
        session: folder of its logs, and of the jobs that run on it.
        server: the `ray start --block` process.
    """

    ray: str
    address: str
    environment: dict[str, str]
    session: Path
    server: subprocess.Popen[bytes]

    def workers(self) -> list[int]:
        """Process ids of this head's Ray Train workers."""
        return [pid for pid, title in descendants(self.server.pid) if "RayTrainWorker" in title]

    def kill(self) -> None:
        """kill -9 the head and all its descendants, like a power failure."""
        processes = [self.server.pid, *(pid for pid, _ in descendants(self.server.pid))]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.wait(timeout=60)


@contextlib.contextmanager
def running_head(folder: Path, cpus: int = 2) -> Iterator[Head]:
    """Start a head with its own token in ``folder``; it is stopped at the end, killed or not."""
    token = folder / f"token_{secrets.token_hex(4)}"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Clients stop reconnecting to a dead head after seconds.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        **QUICK,
    }
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    # Socket paths are limited to 108 characters; those of pytest's folders are longer.
    session = Path("/tmp") / f"ray_{secrets.token_hex(4)}"
    ray = shutil.which("ray", path=environment["PATH"])
    assert ray is not None
    start = [ray, "start", "--head", "--port", str(port), "--dashboard-port", str(dashboard)]
    start += ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(session), "--num-cpus", str(cpus)]
    server = subprocess.Popen(
        [*start, "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        begin = time.monotonic()
        listed = [ray, "job", "list"]
        while not _listens(dashboard) or subprocess.run(listed, env=environment, capture_output=True).returncode != 0:
            assert server.poll() is None and time.monotonic() - begin < 400, "the head did not start"
            time.sleep(0.5)
        yield Head(ray, f"127.0.0.1:{port}", environment, session, server)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def _listens(port: int) -> bool:
    """Whether the port is open; cheaper than `ray job list`, which takes two seconds of a core to start."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(ancestor: int) -> list[tuple[int, str]]:
    """(process id, command line) of all descendants of a process."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process may end while /proc is read
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    found = []
    for pid, title in titles.items():
        above = parents.get(pid, 0)
        while above not in (0, 1, ancestor):
            above = parents.get(above, 0)
        if above == ancestor:
            found.append((pid, title))
    return sorted(found)
