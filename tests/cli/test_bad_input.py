"""Invalid input to the main job: one error message, exit status 2, no traceback, no partial files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_curriculum import write_files

ROOT = Path(__file__).resolve().parents[2]


def job(path: Path, storage: Path, *extra: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the main job in a separate process, without Ray unless ``extra`` sets workers."""
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--storage", str(storage)]
    command += ["--data-root", str(path.parent), "--workers", "0", *extra]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | (env or {})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def replace(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def raw_sources(path: Path) -> None:
    """Replace the synthetic sources by sources on disk whose folders are empty."""
    (path.parent / "raw").mkdir()
    text = "\n".join(line for line in path.read_text().splitlines() if "synthetic" not in line)
    path.write_text(text.replace("root: .", "root: raw"))


def no_checkpoint(path: Path) -> None:
    (path.parent / "weights.pth").write_text("these are no weights")
    replace("initialise: base.yaml", "weights: weights.pth")(path)


def unknown_key(path: Path) -> None:
    with (path.parent / "two.yaml").open("a") as stream:
        stream.write("sampler_length: [3]\n")


def binary_file(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


CASES = {
    "unknown key": (unknown_key, (), ("unknown configuration key sampler_length", "two.yaml:", "sampler_lengths")),
    "binary file": (binary_file, (), ("curriculum.yaml",)),
    "empty folder": (raw_sources, (), ("raw",)),
    "absent weights": (replace("initialise: base.yaml", "weights: no.pth"), (), ("no.pth", "do not exist")),
    "no checkpoint": (no_checkpoint, (), ("weights.pth",)),
    "class without source": (replace(", car: [car, van]", ""), (), ("car", "Vis-Adaptation")),
    "class without label": (replace("car: [car]}", "car: [zebra]}"), (), ("car", "zebra")),
    "no clip": (lambda path: None, ("--set", "sampler_lengths=[9]"), ("no clip to train on",)),
    "too few videos": (replace("source: ground, videos: 2", "source: ground, videos: 56"), (), ("56", "fewer")),
    "wrong metric": (replace("videos: 1}], initialise", "videos: 1}], best: HOTAA, initialise"), (), ("HOTAA",)),
    "no such stage": (lambda path: None, ("--until", "Vis-Nothing"), ("Vis-Nothing", "Vis-Specialist")),
    "bad override": (lambda path: None, ("--set", "LR"), ("KEY=VALUE",)),
    "negative workers": (lambda path: None, ("--workers", "-1"), ("--workers",)),
    "missing data root": (lambda path: None, ("--data-root", "/nowhere/at/all"), ("/nowhere/at/all", "--data-root")),
    "dead address": (lambda path: None, ("--workers", "1"), ("RAY_ADDRESS", "127.0.0.1:9")),
}


@pytest.mark.parametrize("name", CASES)
def test_invalid_input_is_one_message_and_leaves_no_partial_files(name: str, tmp_path: Path) -> None:
    edit, extra, parts = CASES[name]
    path = write_files(tmp_path)
    edit(path)
    result = job(path, tmp_path / "storage", *extra, env={"RAY_ADDRESS": "127.0.0.1:9"})
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr
    left = [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*") if each.is_file()]
    assert not [each for each in left if ".tmp" in each or "checkpoint" in each], left


def test_storage_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "storage").write_text("")
    result = job(path, tmp_path / "storage")
    assert result.returncode == 2 and "--storage" in result.stderr and "Traceback" not in result.stderr


def test_missing_token_is_an_error(tmp_path: Path) -> None:
    """Token authentication without a token fails before a connection is attempted."""
    import socket

    path = write_files(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        env = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
        result = job(path, tmp_path / "storage", "--workers", "1", env=env)
    assert result.returncode == 2, result.stderr
    assert "token" in result.stderr and "Traceback" not in result.stderr


def test_relative_paths_are_errors_in_a_submitted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from motip.errors import MotipError
    from motip.storage.named_folders import checked_data_root, checked_storage

    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for check in (checked_storage, checked_data_root):
        with pytest.raises(MotipError, match="absolute"):
            check("outputs")
    assert checked_storage(str(tmp_path / "outputs")) == str(tmp_path / "outputs")
