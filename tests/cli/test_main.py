"""The verbs of the `motip` command; in this process, except for tests of its start and of signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from motip.data.formats.result_files import read_mot, write_mot
from motip.data.sequence import TrackRows
from tests.helpers.small_dataset import FRAMES, write_checkpoint, write_curriculum, write_dance_dataset
from tests.helpers.videos import facts, write_video


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A folder with raw data, a curriculum file, a stage file, a checkpoint and a video."""
    root = tmp_path_factory.mktemp("cli")
    write_dance_dataset(root / "raw")
    write_curriculum(root / "curriculum.yaml", repo_root)
    write_checkpoint(root / "tiny.pth", root / "stage.yaml")
    write_video(root / "in.mp4")
    return root


VERBS = [
    "track",
    "convert",
    "evaluate",
    "compare",
    "train preflight",
    "job submit",
    "weights inspect",
    "weights transfer",
    "weights export",
    "shards inspect",
    "results export",
    "report errors",
    "report dashboard",
    "lineage show",
    "lineage verify",
]


def test_help_is_fast_and_imports_no_heavy_package() -> None:
    heavy = ("torch", "cv2", "ray", "mlflow", "pyarrow", "av", "pydantic", "numpy")
    code = (
        "import sys; sys.argv = ['motip', '--help']\n"
        "from motip.cli.main import main\n"
        "try: main()\n"
        f"finally: print('loaded:', [m for m in {heavy} if m in sys.modules])"
    )
    begin = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 5  # under 1 s on an idle machine; imports are checked below
    assert "loaded: []" in ended.stdout
    assert all(verb.split()[0] in ended.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(motip, verb: str) -> None:  # type: ignore[no-untyped-def]
    ran = motip(*verb.split(), "--help")
    assert ran.status == 0 and f"Example: motip {verb}" in ran.out


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_track_accepts_hyphens_and_underscores_without_config(
    motip, inputs: Path, tmp_path: Path, spelling: str
) -> None:  # type: ignore[no-untyped-def]
    flags = {
        "--checkpoint": inputs / "tiny.pth",
        "--video_path": inputs / "in.mp4",
        "--output_path": tmp_path / "out.mp4",
        "--score_thresh": 0.02,
        "--longterm_patience": 30,
        "--longterm_similarity": 0.7,
        "--longterm_capacity": 12,
        "--start_frame": 2,
        "--end_frame": 5,
        "--miss_tolerance": 8,
        "--device": "cpu",
    }
    arguments = [part for flag, value in flags.items() for part in ("--" + flag[2:].replace("_", spelling), value)]
    ran = motip("track", *arguments)
    assert ran.status == 0, ran.err
    assert "4 frames" in ran.last_line and str(tmp_path / "out.mp4") in ran.last_line
    assert "long-term memory on: patience 30 frames, similarity 0.7, at most 12 tracks" in " ".join(ran.out.split())
    found = facts(tmp_path / "out.mp4")
    assert (found.codec, found.frames, found.fps) == ("h264", 4, 12)
    rows = read_mot(tmp_path / "out.txt")
    assert set(rows.frames.tolist()) <= {1, 2, 3, 4} and len(rows) and rows.scores.min() > 0.02


def test_track_reads_a_pattern_and_an_exported_model(motip, inputs: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert motip("weights", "export", inputs / "tiny.pth", tmp_path / "exported").status == 0
    pattern = inputs / "raw/DanceTrack/val/v0/img1/%08d.png"
    ran = motip(
        "track",
        "--checkpoint",
        tmp_path / "exported",
        "--video_path",
        pattern,
        "--output_path",
        tmp_path / "o.mp4",
        "--config-path",
        inputs / "stage.yaml",
    )
    assert ran.status == 0, ran.err
    assert (facts(tmp_path / "o.mp4").frames, facts(tmp_path / "o.mp4").fps) == (FRAMES, 10)


def test_ctrl_c_leaves_complete_files(inputs: Path, tmp_path: Path) -> None:
    long = write_video(tmp_path / "long.mp4", frames=2000)
    command = [
        sys.executable,
        "-m",
        "motip.cli",
        "track",
        "--checkpoint",
        str(inputs / "tiny.pth"),
        "--video_path",
        str(long),
        "--output_path",
        str(tmp_path / "out.mp4"),
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "out.jsonl"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        begin = time.monotonic()
        # The temporary file exists once frames are written.
        while not list(tmp_path.glob(".out.*.mp4")) and time.monotonic() - begin < 120:
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    found = facts(tmp_path / "out.mp4")
    assert 1 <= found.frames < 2000 and f"interrupted after {found.frames} frames" in out
    assert (tmp_path / "out.txt").is_file()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == found.frames
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.mp4", "out.jsonl", "out.mp4", "out.txt"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--video_path": "gone.mp4"}, "no such video"),
        ({"--video_path": "stage.yaml"}, "cannot be opened"),
        ({"--video_path": "raw"}, "no images"),
        ({"--checkpoint": "gone.pth"}, "weights file does not exist"),
        ({"--checkpoint": "in.mp4"}, ""),
        ({"--output_path": "/proc/none/out.mp4"}, "cannot be written"),
        ({"--output_path": "out.avi"}, "written as MP4"),
        ({"--output_path": "in.mp4"}, "would replace the input video"),
        ({"--device": "cuda:99"}, "no such device"),
        ({"--score_thresh": "7"}, "DET_THRESH"),
        ({"--start_frame": "0"}, "frame range is empty"),
        ({"--config_path": "gone.yaml"}, "configuration file not found"),
    ],
)
def test_invalid_track_input_is_one_message(motip, inputs: Path, tmp_path: Path, changed, message: str) -> None:  # type: ignore[no-untyped-def]
    flags = {
        "--checkpoint": "tiny.pth",
        "--video_path": "in.mp4",
        "--output_path": str(tmp_path / "out.mp4"),
        **changed,
    }
    values = {
        flag: inputs / value if (inputs / value).exists() or value.startswith("gone") else value
        for flag, value in flags.items()
    }
    ran = motip("track", *(part for pair in values.items() for part in pair))
    assert ran.status == 2
    assert ran.err.startswith("error: ") and message in ran.err and "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_with_other_classes_than_the_config_is_an_error(motip, inputs: Path, repo_root: Path) -> None:  # type: ignore[no-untyped-def]
    ran = motip(
        "track",
        "--checkpoint",
        inputs / "tiny.pth",
        "--video_path",
        inputs / "in.mp4",
        "--output_path",
        inputs / "x.mp4",
        "--config_path",
        repo_root / "configs/demo/motip_tiny.yaml",
    )
    assert ran.status == 2 and "classes of the checkpoint differ" in ran.err


def test_weights_inspect(motip, inputs: Path) -> None:  # type: ignore[no-untyped-def]
    ran = motip("weights", "inspect", inputs / "tiny.pth")
    assert ran.status == 0 and "pedestrian, car (file)" in ran.out and "parameters in" in ran.last_line
    found = json.loads(motip("weights", "inspect", inputs / "tiny.pth", "--json").out)
    assert found["classes"] == ["pedestrian", "car"] and found["kind"] == "ours" and found["training"]["step"] == 1
    assert motip("weights", "inspect", inputs / "curriculum.yaml").status == 2


def test_weights_transfer_reports_every_tensor_and_writes_the_checkpoint(motip, inputs: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    overrides = ("--set", "NUM_CLASSES=3", "--set", "CLASSES=[car, truck, pedestrian]")
    arguments = ("weights", "transfer", inputs / "tiny.pth", "--config", inputs / "stage.yaml", *overrides)
    ran = motip(*arguments, "--output", tmp_path / "three.pth")
    assert ran.status == 0, ran.err
    assert "truck" in ran.out and "model tensors" in ran.out and "three.pth" in ran.last_line
    report = json.loads(motip(*arguments, "--json").out)
    assert sum(report["counts"]["model"].values()) == len(report["model"])
    verbose = motip(*arguments, "--verbose").out
    assert all(key in verbose for key in report["model"])
    again = json.loads(motip("weights", "inspect", tmp_path / "three.pth", "--json").out)
    assert again["classes"] == ["car", "truck", "pedestrian"]
    assert again["parent"]["sha256"] == report["sha256"]


def test_shards_from_conversion_to_report(motip, inputs: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = motip(
        "convert",
        "--config",
        inputs / "curriculum.yaml",
        "--data-root",
        inputs / "raw",
        "--storage",
        tmp_path / "s",
        "--to",
        "dancetrack",
        tmp_path / "dt",
    )
    assert ran.status == 0, ran.err
    assert (tmp_path / "dt/val_seqmap.txt").read_text().split() == ["name", "v0", "v1"]
    assert f"2 videos, {2 * FRAMES} frames, {4 * FRAMES} objects" in ran.out
    ran = motip("shards", "inspect", tmp_path / "s")
    assert ran.status == 0 and f"4 videos, {4 * FRAMES} frames" in ran.last_line
    assert "dance/train" in ran.out and f"pedestrian {2 * FRAMES} (2)" in ran.out
    found = json.loads(motip("shards", "inspect", tmp_path / "s", "--json").out)
    assert [video["video"] for video in found["videos"]] == ["t0", "t1", "v0", "v1"]
    ran = motip("shards", "inspect", tmp_path / "s/shards/dance/val/v0.parquet")
    assert ran.status == 0 and f"{FRAMES} frames, {2 * FRAMES} boxes" in ran.last_line and "160x96" in ran.out
    for wrong in (tmp_path / "none", tmp_path / "none.parquet"):
        ran = motip("shards", "inspect", wrong)
        assert ran.status == 2 and ran.err.startswith("error: ")


def rows(classes: list[int]) -> TrackRows:
    import numpy as np

    count = len(classes)
    boxes = np.tile(np.array([[10.5, 20, 40, 60]], np.float32), (count, 1))
    return TrackRows(
        np.arange(count),
        np.zeros(count, np.int64),
        boxes,
        np.full(count, 0.75, np.float32),
        np.array(classes, np.int64),
    )


def test_results_export_reads_back_in_each_format(motip, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_mot(tmp_path / "in/a.txt", rows([0, 1, 1]))
    write_mot(tmp_path / "in/b.txt", rows([]))
    ran = motip("results", "export", "--format", "bdd100k", tmp_path / "in", tmp_path / "r.json")
    assert ran.status == 0 and "2 videos, 3 boxes" in ran.last_line
    labels = [label for frame in json.loads((tmp_path / "r.json").read_text()) for label in frame["labels"]]
    assert [label["category"] for label in labels] == ["pedestrian", "car", "car"]
    assert motip("results", "export", "--format", "visdrone", tmp_path / "in", tmp_path / "v.zip").status == 0
    with zipfile.ZipFile(tmp_path / "v.zip") as archive:
        assert sorted(archive.namelist()) == ["a.txt", "b.txt"]
        archive.extract("a.txt", tmp_path)
    assert [line.split(",")[7] for line in (tmp_path / "a.txt").read_text().splitlines()] == ["1", "4", "4"]
    assert motip("results", "export", "--format", "motchallenge", tmp_path / "in/a.txt", tmp_path / "m").status == 0
    assert (tmp_path / "m/a.txt").read_text() == (tmp_path / "in/a.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "coco", "in", "out.json"], "unknown format"),
        (["--format", "bdd100k", "in", "out.txt"], "one JSON file"),
        (["--format", "visdrone", "--classes", "pedestrian,dog", "in", "out.zip"], "no category 'dog'"),
        (["--format", "motchallenge", "--classes", "pedestrian", "in", "out"], "class without a name"),
        (["--format", "motchallenge", "none", "out"], "there are no tracks"),
    ],
)
def test_invalid_results_export_is_an_error(motip, tmp_path: Path, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    write_mot(tmp_path / "in/a.txt", rows([0, 1]))
    ran = motip("results", "export", *arguments[:-2], tmp_path / arguments[-2], tmp_path / arguments[-1])
    assert ran.status == 2 and message in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_lineage_prints_the_chain_and_detects_a_changed_file(motip, inputs: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from motip.lineage import Lineage
    from motip.storage.atomic import sha256_file

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checkpoint = tmp_path / "s" / "checkpoint_best.pth"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes((inputs / "tiny.pth").read_bytes())
    lineage = Lineage(storage=tmp_path / "s")
    parent = lineage.start_curriculum("small", {"a": 1})
    run = lineage.start_stage(parent, "BDD-Foundation", {"LR": 1e-4}, "d" * 64, None)
    lineage.log_stage_result(run, str(checkpoint), sha256_file(checkpoint), {"HOTA": 41.5})
    lineage.finish(run)
    for arguments in (("lineage", run), ("lineage", "show", run), ("lineage", "show", parent)):
        ran = motip(*arguments, "--storage", tmp_path / "s")
        assert ran.status == 0, ran.err
        assert "BDD-Foundation" in ran.out and "41.5" in ran.out and str(checkpoint) in ran.last_line
    steps = json.loads(motip("lineage", "show", run, "--storage", tmp_path / "s", "--json").out)
    assert steps[0]["scores"] == {"HOTA": 41.5}
    assert "all as recorded" in motip("lineage", "verify", run, "--storage", tmp_path / "s").last_line
    checkpoint.write_bytes(b"other")
    ran = motip("lineage", "verify", run, "--storage", tmp_path / "s")
    assert ran.status == 2 and "differ from what the runs recorded" in ran.err and "changed" in ran.out
    ran = motip("lineage", run, "--storage", (tmp_path / "s").as_uri())
    assert ran.status == 0 and "BDD-Foundation" in ran.out
    ran = motip("lineage", run, "--storage", tmp_path / "elsewhere")
    assert ran.status == 2 and "no runs were recorded here" in ran.err
    assert not (tmp_path / "elsewhere").exists()


def test_lineage_of_a_remote_storage_is_read_from_its_local_database(motip, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from motip.lineage import Lineage

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = motip("lineage", "0" * 32, "--storage", "s3://bucket/runs")
    assert ran.status == 2 and "no runs were recorded here" in ran.err and not (tmp_path / "motip").exists()
    lineage = Lineage(storage="s3://bucket/runs")
    run = lineage.start_stage(lineage.start_curriculum("small", {"a": 1}), "Aerial", {"LR": 1e-4}, "d" * 64, None)
    lineage.finish(run)
    ran = motip("lineage", run, "--storage", "s3://bucket/runs")
    assert ran.status == 0 and "Aerial" in ran.out, ran.err
    ran = motip("compare", run, run, "--storage", "s3://bucket/runs")
    assert ran.status == 2 and "no runs were recorded here" not in ran.err and run in ran.err
