"""Headless Chromium over the W3C WebDriver protocol (HTTP and JSON), without an extra package."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TAB = "\ue004"
STARTS_WITHIN_S = 60.0


class Browser:
    """One window of a running browser."""

    def __init__(self, address: str) -> None:
        self._address = address
        # A test in a container may be root and have little shared memory.
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--mute-audio"]
        options = {"args": arguments, "binary": shutil.which("chromium") or shutil.which("google-chrome")}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        started = self._request("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{started['sessionId']}"

    def open(self, address: str) -> None:
        self._request("POST", f"{self._session}/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that JavaScript returns; a promise is awaited."""
        return self._request("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, key: str) -> None:
        """Press and release a key in the focused element."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._request(
            "POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        )

    def log(self, kind: str = "browser") -> list[dict[str, Any]]:
        """Entries of the console (``browser``) or network (``performance``) log since the last call."""
        return list(self._request("POST", f"{self._session}/se/log", {"type": kind}))

    def set_screen(self, width: int, height: int, scheme: str) -> None:
        """Emulate a screen of this size in CSS pixels, in ``light`` or ``dark``."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path, height: int) -> None:
        """Write a PNG of the top ``height`` CSS pixels of the page, which may exceed the screen."""
        width = self.run("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self._request("DELETE", self._session)

    def _devtools(self, command: str, values: dict[str, Any]) -> Any:
        return self._request("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": values})

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}{path}", data, {"Content-Type": "application/json"})
        request.method = method
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from error


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser for the block; the test is skipped if none is installed.

    Args:
        folder: for the driver's log.
    """
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium with chromedriver on this machine (Debian: chromium, chromium-driver)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "chromedriver.log").open("wb") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log)
        try:
            window = Browser(_ready(f"http://127.0.0.1:{port}", process, folder / "chromedriver.log"))
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
            process.wait(timeout=30)


def _ready(address: str, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/status", timeout=5) as answer:
            if json.load(answer)["value"]["ready"]:
                return address
        time.sleep(0.1)
    raise AssertionError(f"chromedriver did not start: {log.read_text(errors='replace')[-500:]}")
