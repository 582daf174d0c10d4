"""A real ``mlflow server`` on loopback for tests, and the page of its UI that compares runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.browser import Browser

STARTS_WITHIN_S = 600.0
DRAWN_WITHIN_S = 60.0

ROW = """
const [name, cells] = arguments;
const shown = [...document.querySelectorAll('*')].filter(
  each => !each.children.length && (each.innerText || '').trim());
const middle = each => { const box = each.getBoundingClientRect(); return box.top + box.height / 2; };
const found = shown.filter(each => each.innerText.trim() === name).map(first => shown
  .filter(each => Math.abs(middle(each) - middle(first)) < 8)
  .filter(each => each.getBoundingClientRect().left > first.getBoundingClientRect().left)
  .sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)
  .map(each => each.innerText.trim()).slice(0, cells)).filter(row => row.length === cells);
return found.length ? found[found.length - 1] : null"""
"""What stands to the right of a name: parameters are a table, metrics a grid that has only what is in view."""

SCROLL = """
for (const each of document.querySelectorAll('*'))
  if (each.scrollHeight > each.clientHeight + 20 && getComputedStyle(each).overflowY !== 'visible'
      && each.className.toString().includes('Grid'))
    each.scrollTop = each.scrollTop + each.clientHeight + 5 > each.scrollHeight ? 0 : each.scrollTop + 200;"""


class Server:
    """A server that can be stopped and started again.

    Args:
        folder: for its log, its artifacts, and its database where none is given.
        database: SQLite file to serve.
    """

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.database = database or folder / "ml.db"
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # Its background jobs (scoring, traces) are processes of their own, and of no use here.
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **quiet}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"mlflow server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._process is not None:
            # No farewell: answers get lost after the server has acted, as in a real outage.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            self._process = None


@contextlib.contextmanager
def serving(folder: Path, database: Path | None = None) -> Iterator[Server]:
    """A running server for the block."""
    server = Server(folder, database)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def comparison(address: str, runs: Sequence[str], experiment: str) -> str:
    """Address of the page that compares the runs."""
    ids, experiments = (
        urllib.parse.quote(json.dumps(each, separators=(",", ":"))) for each in (list(runs), [experiment])
    )
    return f"{address}/#/compare-runs?runs={ids}&experiments={experiments}"


def compared(window: Browser, page: str, names: Sequence[str], runs: int) -> dict[str, list[str]]:
    """Open a comparison, and read what it shows of these parameters and metrics.

    Returns:
        Name -> the cells of the runs, as text.
    """
    window.open(page)
    return {name: row(window, name, runs) for name in names}


def row(window: Browser, name: str, runs: int) -> list[str]:
    """The cells beside a name, once they are there; grids are scrolled until it comes into view."""
    end = time.monotonic() + DRAWN_WITHIN_S
    while time.monotonic() < end:
        cells = window.run(ROW, name, runs)
        if cells:
            return [str(cell) for cell in cells]
        window.run(SCROLL)
        time.sleep(0.5)
    text = str(window.run("return document.body.innerText"))
    raise AssertionError(f"no {name} with {runs} cells on the page: {text[:3000]}")
