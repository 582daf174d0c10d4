"""An ``mlflow server`` on loopback for tests, and the page of its UI that compares runs."""

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

from tests.helpers.browser import Browser

START_TIMEOUT_S = 600.0
RENDER_TIMEOUT_S = 300.0

ROW = """
const [name, cells] = arguments;
const text = each => (each.innerText || '').trim();
const head = [...document.querySelectorAll('tr > th')].find(each => text(each) === name);
if (head) return [...head.parentElement.querySelectorAll('td')].map(text).slice(0, cells);
const [names, values] = document.querySelectorAll('[role=grid]');
if (!values) return null;
const link = [...names.querySelectorAll('a')].find(each => text(each) === name);
if (!link) return null;
const top = link.closest('[style*="top"]').style.top;
const found = [...values.querySelectorAll('[style*="top"]')].filter(each => each.style.top === top)
  .sort((one, other) => parseFloat(one.style.left) - parseFloat(other.style.left)).map(text);
if (found.length < cells) return null;
values.scrollTop = parseFloat(top);
return found.slice(0, cells)"""
"""The cells of a name. Parameters are a table; metrics are two grids, of names and of values, which contain only the
rows in view, positioned by their style; the row that is found is scrolled to the top."""

SCROLL = """
const values = document.querySelectorAll('[role=grid]')[1];
if (values) values.scrollTop =
  values.scrollTop + values.clientHeight >= values.scrollHeight ? 0 : values.scrollTop + 0.8 * values.clientHeight;"""
"""Scrolls the grid of values by most of its height; the grid of names follows."""

FOLD = """
document.querySelector('[aria-label="Close"]')?.click();
document.querySelector('[aria-label="collapse Visualizations"]')?.click();
for (const each of document.querySelectorAll('[role=switch]')) if (each.ariaChecked !== 'true') each.click();"""
"""Closes the assistant and the plots, and hides parameters, metrics and tags that are equal in all runs."""


class Server:
    """A server that can be stopped and started again.

    Args:
        folder: for its log, its artifacts, and its database if none is given.
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
        # Its background jobs (scoring, traces) are separate processes that are not needed.
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **quiet}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
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
            # SIGKILL: responses may be lost after the server has acted, as in a real outage.
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
    """Open a comparison and read the rows of these parameters and metrics.

    Returns:
        Name -> the cells of the runs, as text.
    """
    window.open(page)
    return {name: row(window, name, runs) for name in names}


def only_differences(window: Browser) -> None:
    """Hide everything of an open comparison except the tables of differing parameters, metrics and tags."""
    window.run(FOLD)


def row(window: Browser, name: str, runs: int) -> list[str]:
    """The cells beside a name, once rendered; the grid of metrics is scrolled until the name is in view."""
    end = time.monotonic() + RENDER_TIMEOUT_S
    while time.monotonic() < end:
        cells = window.run(ROW, name, runs)
        if cells:
            return [str(cell) for cell in cells]
        window.run(SCROLL)
        time.sleep(0.25)
    text = str(window.run("return document.body.innerText"))
    raise AssertionError(f"no {name} with {runs} cells on the page: {text[:3000]}")
