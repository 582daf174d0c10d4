"""MotipError: message, pickling, causes, exit status; atomic files and digests."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from motip.errors import MotipError, check_known, did_you_mean, exit_on_error, find_motip_error
from motip.storage.atomic import atomic_write, digest, write_json_atomic

ROOT = Path(__file__).resolve().parents[2]


def test_message_has_all_parts() -> None:
    error = MotipError("too few videos", where="a.yaml:3", found=7, expected="at least 56", fix="ask for fewer")
    lines = str(error).splitlines()
    assert lines[0] == "too few videos"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["where", "found", "expected", "fix"]


def test_unknown_name_lists_the_known_ones() -> None:
    check_known("dance", ["dance", "ground"], "unknown source {name}")
    check_known([], [], "unknown source {name}")
    with pytest.raises(MotipError) as caught:
        check_known(["dance", "lake"], ["dance", "ground"], "unknown source {name!r}", where="a.yaml", fix="drop it")
    assert str(caught.value) == str(
        MotipError("unknown source 'lake'", where="a.yaml", expected="some of dance, ground", fix="drop it")
    )
    with pytest.raises(MotipError) as caught:
        check_known("lake", {"dance": 1}, "no such source", where="--source")
    assert str(caught.value) == str(
        MotipError("no such source", where="--source", found="lake", expected="one of dance")
    )


def test_closest_known_name_is_suggested() -> None:
    assert did_you_mean("numworker", ["NUM_WORKERS", "LR"], "train.") == "did you mean train.NUM_WORKERS?"
    assert did_you_mean("zzz", ["NUM_WORKERS", "LR"]) is None


def test_error_is_picklable() -> None:
    error = MotipError("wrong", where="here", found=1)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes


def test_error_is_found_in_a_chain_of_causes() -> None:
    inner = MotipError("the cause")
    try:
        try:
            raise inner
        except MotipError as error:
            raise RuntimeError("wrapped by a cluster") from error
    except RuntimeError as outer:
        assert find_motip_error(outer) is inner
    assert find_motip_error(ValueError("other")) is None


def test_entry_points_print_one_message_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise MotipError("too few videos", fix="ask for fewer")
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: too few videos") and "Traceback" not in shown


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error():
        _ = 1 / 0


def test_missing_system_library_is_reported_with_its_package(tmp_path: Path) -> None:
    """Without libGL, OpenCV is installed but its import fails."""
    package = tmp_path / "cv2"
    package.mkdir()
    text = "libGL.so.1: cannot open shared object file: No such file or directory"
    (package / "__init__.py").write_text(f"raise ImportError({text!r})\n")
    data = tmp_path / "data"
    data.mkdir()
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", "configs/demo/curriculum.yaml", "--workers", "0"]
    result = subprocess.run(
        [*command, "--storage", str(tmp_path / "storage")],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "libGL.so.1" in result.stderr and "apt-get install libgl1" in result.stderr
    assert "Traceback" not in result.stderr


def test_atomic_write_is_published_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json_atomic(path, {"b": 1, "a": [2]})
    before = path.read_text()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("partial")
        raise RuntimeError("interrupted")
    assert path.read_text() == before
    assert [child.name for child in path.parent.iterdir()] == ["value.json"]


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MotipError, match="cannot write") as caught:
        write_json_atomic(tmp_path / "file" / "value.json", {})
    assert "writable" in str(caught.value)


def test_equal_values_have_equal_digests() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
