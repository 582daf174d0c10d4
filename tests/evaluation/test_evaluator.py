from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import motip
from motip.cluster import Cluster, connect, disconnect
from motip.config import load_curriculum
from motip.data.convert import convert
from motip.data.manifest import Manifest
from motip.data.sequence import ClassMap
from motip.errors import MotipError
from motip.evaluation.checkpoint import EvaluateOptions, device_of_workers, evaluate_checkpoint
from motip.evaluation.evaluator import (
    EvalJob,
    Evaluation,
    ModelUnderTest,
    VideoTracker,
    evaluate_videos,
    map_videos,
)
from motip.evaluation.scores import Scores
from motip.stage_folder import evaluation_folder
from motip.tracking.loading import load
from motip.tracking.settings import TrackerSettings
from tests.helpers.small_dataset import FRAMES, write_checkpoint, write_curriculum, write_dance_dataset

CLASSES = {"pedestrian": ("pedestrian",), "car": ("car",)}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """Storage with converted shards and a checkpoint."""
    root = tmp_path_factory.mktemp("evaluate")
    write_dance_dataset(root / "raw")
    curriculum = load_curriculum(write_curriculum(root / "curriculum.yaml", repo_root))
    convert(curriculum, root / "raw", root / "storage")
    write_checkpoint(root / "storage" / "tiny.pth", root / "stage.yaml")
    return root / "storage"


def run(storage: Path, folder: Path, classes: dict[str, tuple[str, ...]] = CLASSES, **options: object) -> Evaluation:
    loaded = load(str(storage / "tiny.pth"))
    model = ModelUnderTest(loaded.model, loaded.meta["sha256"], loaded.settings)
    videos = Manifest.load(storage).of("dance", "val")
    maps = {"dance": ClassMap(("pedestrian", "car"), classes)}
    job = EvalJob(videos, str(storage), folder, "val", **options)  # type: ignore[arg-type]
    return evaluate_videos(model, job, maps, {"dance": "plain"})


def test_every_video_is_tracked_once_scored_and_stored(storage: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    done = run(storage, tmp_path, on_video=lambda video, number, total: seen.append((video.video, number, total)))
    assert seen == [("v0", 1, 2), ("v1", 2, 2)] and done.reused == 0
    scores = done.scores["dance"]
    assert scores.sequences == ("v0", "v1") and scores.per_class["car"]["GT"] == 2 * FRAMES
    assert scores.class_agnostic["FN"] + scores.class_agnostic["TP"] == 2 * 2 * FRAMES  # type: ignore[operator]
    written = sorted(path.name for path in (tmp_path / "tracks/dance/val").iterdir())
    assert written == ["v0.json", "v0.txt", "v1.json", "v1.txt"]
    assert len((tmp_path / "tracks/dance/val/v0.txt").read_text().splitlines()) > 0


def test_second_run_tracks_only_missing_or_changed_videos(storage: Path, tmp_path: Path) -> None:
    first = run(storage, tmp_path)
    folder = tmp_path / "tracks/dance/val"
    (folder / "v0.json").unlink()
    second = run(storage, tmp_path)
    assert second.reused == 1 and second.scores["dance"].to_json() == first.scores["dance"].to_json()
    stale = json.loads((folder / "v1.json").read_text())
    (folder / "v1.json").write_text(json.dumps({**stale, "inputs": "of other weights"}))
    assert run(storage, tmp_path).reused == 1


def test_videos_without_a_label_of_the_classes_are_tracked_only(storage: Path, tmp_path: Path) -> None:
    done = run(storage, tmp_path, classes={"car": ("truck",)})
    assert done.scores == {} and done.tracked_only == ("dance",)
    assert (tmp_path / "tracks/dance/val/v1.txt").is_file()


def test_classes_to_eval_of_the_checkpoint_are_averaged(storage: Path, tmp_path: Path) -> None:
    root = storage.parent
    checkpoint = write_checkpoint(tmp_path / "car.pth", root / "stage.yaml", "val_config.CLASSES_TO_EVAL=[car]")
    done = evaluate_checkpoint(
        EvaluateOptions(str(checkpoint), str(root / "curriculum.yaml"), storage=str(storage), workers=0)
    )
    scores = done.evaluation.scores["dance"]
    assert scores.class_averaged == scores.per_class["car"] and scores.per_class["pedestrian"]["GT"] == 2 * FRAMES
    (written,) = (storage / "evaluations").rglob("scores_val.json")
    assert json.loads(written.read_text())["averaged"] == ["car"]


def test_public_function_writes_the_scores_it_returns(storage: Path) -> None:
    found = motip.evaluate(storage / "tiny.pth", storage.parent / "curriculum.yaml", storage)
    folder = Path(str(evaluation_folder(storage, load(storage / "tiny.pth").sha256)))
    stored = json.loads((folder / "scores_val.json").read_text())
    assert found.scores["dance"] == Scores.from_json(stored["sources"]["dance"]) and stored["split"] == "val"


def test_a_source_without_a_label_of_the_averaged_classes_is_tracked_only(storage: Path, tmp_path: Path) -> None:
    classes = {"pedestrian": ("pedestrian",), "car": ("truck",)}
    assert run(storage, tmp_path, classes=classes, averaged=("car",)).tracked_only == ("dance",)
    assert run(storage, tmp_path, classes=classes, averaged=("pedestrian",)).tracked_only == ()


def test_device_of_actors_follows_the_cluster_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with_gpus, without = Cluster(8, 2, 2, True), Cluster(8, 0, 2, True)
    devices = [device_of_workers(name, with_gpus) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert devices == ["cuda", "cuda", "cuda", "cpu"]
    assert [device_of_workers(name, without) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    assert device_of_workers("auto", None) == "cpu"
    with pytest.raises(MotipError, match="the Ray cluster has no GPU"):
        device_of_workers("cuda", without)
    for cluster, name in ((None, "cuda"), (with_gpus, "tpu")):
        with pytest.raises(MotipError, match="no such device"):
            device_of_workers(name, cluster)
    # A GPU of the driver that is not a Ray resource cannot be used by actors.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of_workers("auto", without) == "cpu"


def test_evaluation_folder_is_named_by_the_digest(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "0123456789ab"
    assert evaluation_folder(tmp_path, "0123456789abcdef") == evaluation_folder(str(tmp_path), "0123456789ab") == folder


class FakeRay(ModuleType):
    """Ray with actors that answer at once, in order of submission; ``dies`` lists the calls during which one dies."""

    def __init__(self, dies: dict[str, int]) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayActorError=type("RayActorError", (Exception,), {}))
        self.dies, self.alive, self.started = Counter(dies), 0, 0

    def remote(self, **_: object) -> Callable[[type], object]:
        def start(*_: object) -> object:
            self.alive, self.started = self.alive + 1, self.started + 1
            return SimpleNamespace(
                __ray_ready__=SimpleNamespace(remote=lambda: _Reference("start")),
                track=SimpleNamespace(remote=lambda video: _Reference(video.video)),
            )

        return lambda worker: SimpleNamespace(remote=start)

    def put(self, value: object) -> object:
        return value

    def wait(self, references: list[_Reference], num_returns: int) -> tuple[list[_Reference], list[_Reference]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: _Reference) -> tuple[str, dict[str, object]]:
        if self.dies[reference.call] > 0:
            self.dies[reference.call] -= 1
            raise self.exceptions.RayActorError("out of memory")
        return reference.call, {}

    def kill(self, actor: object) -> None:
        self.alive -= 1


@dataclass(frozen=True, eq=False)
class _Reference:
    call: str


def _on_fake_ray(monkeypatch: pytest.MonkeyPatch, dies: dict[str, int], storage: Path) -> tuple[FakeRay, list[str]]:
    fake = FakeRay(dies)
    monkeypatch.setitem(sys.modules, "ray", fake)
    videos = Manifest.load(storage).of("dance", "val")
    job = EvalJob(videos, str(storage), storage, cluster=Cluster(2, 0, 1, True))
    model = ModelUnderTest(None, "0", TrackerSettings())  # type: ignore[arg-type]
    try:
        return fake, [video.video for video, _, _ in map_videos(VideoTracker, model, videos, job)]
    finally:
        assert fake.alive == 0, "every actor ends with the evaluation"


def test_a_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    fake, done = _on_fake_ray(monkeypatch, {"v0": 2, "start": 1}, storage)
    assert sorted(done) == ["v0", "v1"] and fake.started == 2 + 3


@pytest.mark.parametrize(
    ("dies", "message"),
    [
        ({"v1": 3}, r"3 workers died on the same video\n.*dance/v1\n.*out of memory"),
        ({"start": 3}, r"3 workers died while starting\n.*worker start-up\n"),
    ],
)
def test_the_third_death_is_an_error_that_names_the_video(
    monkeypatch: pytest.MonkeyPatch, storage: Path, dies: dict[str, int], message: str
) -> None:
    with pytest.raises(MotipError, match=message):
        _on_fake_ray(monkeypatch, dies, storage)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[object]:
    cluster = connect(num_cpus=2)
    yield cluster
    disconnect()


@pytest.mark.cluster
def test_actors_and_one_process_give_equal_scores(storage: Path, tmp_path: Path, ray_cluster: object) -> None:
    local = run(storage, tmp_path / "local")
    remote = run(storage, tmp_path / "remote", cluster=ray_cluster, workers=2)
    assert remote.scores["dance"].to_json() == local.scores["dance"].to_json()
    with pytest.raises(MotipError, match="more workers than CPUs"):
        run(storage, tmp_path / "too_many", cluster=ray_cluster, workers=50)
