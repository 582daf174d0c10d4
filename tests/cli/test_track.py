"""`motip track`: JSON lines, half precision, and invalid input. Flags: test_main.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest

from motip.data.formats.result_files import read_mot
from tests.conftest import Motip
from tests.helpers.small_dataset import write_checkpoint, write_curriculum
from tests.helpers.videos import facts, write_video


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A folder with a curriculum file, a stage file, a checkpoint and a video."""
    root = tmp_path_factory.mktemp("command")
    write_curriculum(root / "curriculum.yaml", repo_root)
    write_checkpoint(root / "tiny.pth", root / "stage.yaml")
    write_video(root / "in.mp4")
    return root


def arguments(workspace: Path, output: Path, **changes: object) -> list[object]:
    values = {
        "--checkpoint": workspace / "tiny.pth",
        "--video_path": workspace / "in.mp4",
        "--output_path": output,
        "--score_thresh": 0.02,
        "--newborn_thresh": 0.02,
        "--device": "cpu",
    } | {f"--{name}": value for name, value in changes.items()}
    return ["track", *(part for pair in values.items() for part in pair)]


def test_json_lines_equal_the_mot_rows(motip: Motip, workspace: Path, tmp_path: Path) -> None:
    ran = motip(*arguments(workspace, tmp_path / "out.mp4", json=tmp_path / "new" / "out.jsonl", start_frame=2))
    assert ran.status == 0, ran.err
    assert str(tmp_path / "new" / "out.jsonl") in ran.last_line
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [2, 3, 4, 5, 6, 7]
    rows = read_mot(tmp_path / "out.txt")
    objects = {(line["frame"], each["id"]): each for line in lines for each in line["tracks"]}
    assert len(objects) == len(rows) > 0
    for frame, track_id, box, score in zip(rows.frames, rows.track_ids, rows.boxes_xyxy, rows.scores, strict=True):
        each = objects[int(frame) + 1, int(track_id) + 1]
        x, y, width, height = each["box_xywh"]
        assert [x, y, x + width, y + height] == pytest.approx(box.tolist(), abs=0.02)
        assert each["score"] == pytest.approx(float(score), abs=1e-3)


def test_json_lines_are_alone_on_standard_output(motip: Motip, workspace: Path, tmp_path: Path) -> None:
    ran = motip(*arguments(workspace, tmp_path / "out.mp4", json="-", longterm_patience=9))
    assert ran.status == 0, ran.err
    assert [json.loads(line)["frame"] for line in ran.out.splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    assert "long-term memory on" in ran.err and "7 frames" in ran.err and "re-identified" in ran.err
    assert facts(tmp_path / "out.mp4").frames == 7


def test_closed_pipe_ends_the_video(workspace: Path, tmp_path: Path) -> None:
    long = write_video(tmp_path / "long.mp4", frames=600)
    words = arguments(workspace, tmp_path / "out.mp4", json="-", video_path=long)
    command = [sys.executable, "-m", "motip.cli", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        assert json.loads(running.stdout.readline())["frame"] == 1
        running.stdout.close()
        err = running.stderr.read()
    assert running.returncode == 1 and "Traceback" not in err and "Broken" not in err, err
    done = facts(tmp_path / "out.mp4").frames
    assert 1 < done < 600 and f"the reader of the JSON lines closed the pipe: stopped after {done} frames" in err


def test_half_precision_tracks(motip: Motip, workspace: Path, tmp_path: Path) -> None:
    ran = motip(*arguments(workspace, tmp_path / "out.mp4", end_frame=2), "--fp16")
    assert ran.status == 0, ran.err
    assert facts(tmp_path / "out.mp4").frames == 2 and len(read_mot(tmp_path / "out.txt")) > 0


def test_half_precision_reaches_the_detector(motip: Motip, workspace: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import torch

    from motip.tracking import api

    seen: list[tuple[bool, object]] = []
    plain = api.normalise

    def recording(*values: object) -> object:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return plain(*values)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "normalise", recording)
    for flags in ([], ["--fp16"]):
        assert motip(*arguments(workspace, tmp_path / "out.mp4", end_frame=1), *flags).status == 0
    assert seen[0][0] is False and seen[1] == (True, torch.float16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_path": "empty.avi"}, "the video has no frames"),
        ({"video_path": "strange.avi"}, "no decoder for this video"),
        ({"start_frame": 30}, "shorter than the requested range"),
        ({"json": "."}, "a separate file"),
        ({"json": "out.txt"}, "a separate file"),
        ({"json": "/proc/none/out.jsonl"}, "cannot be written"),
        ({"device": "abacus", "checkpoint": "gone.pth"}, "no such device"),
        ({"config_path": "other.yaml"}, "classes of the checkpoint differ"),
    ],
)
def test_invalid_input_is_one_message_and_leaves_no_file(
    motip: Motip,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object],
    message: str,
) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    outputs.mkdir()
    monkeypatch.chdir(outputs)
    write_video(inputs / "empty.avi", frames=0)
    strange = write_video(inputs / "strange.avi")
    strange.write_bytes(strange.read_bytes().replace(b"FMP4", b"QQQQ"))
    (inputs / "other.yaml").write_text(f"SUPER_CONFIG_PATH: {workspace}/stage.yaml\nNUM_CLASSES: 1\nCLASSES: [truck]\n")
    named = {
        key: inputs / value if isinstance(value, str) and (inputs / value).is_file() else value
        for key, value in changed.items()
    }
    ran = motip(*arguments(workspace, Path("out.mp4"), **named))
    assert ran.status == 2 and ran.err.startswith("error: ") and message in ran.err
    assert ran.err.count("error: ") == 1 and "Traceback" not in ran.err
    assert list(outputs.iterdir()) == []


def test_missing_encoder_is_an_error_before_the_checkpoint_is_read(
    motip: Motip, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", fail)
    ran = motip(*arguments(workspace, tmp_path / "out.mp4", checkpoint="gone.pth"))
    assert ran.status == 2 and "no H.264 encoder" in ran.err
