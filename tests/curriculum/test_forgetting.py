"""Domain scores after every stage: which domains, what is stored and recorded, and reactions to forgetting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import motip.evaluation.evaluator as evaluate_run
from motip.config import load_config, load_curriculum
from motip.curriculum import domain_scores
from motip.curriculum.forgetting import base_domains, learned_in, seen_after
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap, TrackRows
from motip.data.shards import read_labels
from motip.errors import MotipError
from motip.evaluation.evaluator import VideoTracker
from motip.lineage import Lineage
from motip.storage.atomic import sha256_file
from motip.tracking.settings import TrackerSettings
from motip.train.setup import fresh_model
from motip.weights import save_checkpoint
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.small_curriculum import STAGE, run

SOURCES = """name: small
sources:
  dance:
    format: motchallenge
    root: .
    domain: dance
    classes: {pedestrian: [pedestrian]}
    synthetic: {domain: dance, seed: 3, sequences: {train: 1, val: 2}, frames: 4}
  ground:
    format: bdd100k
    root: .
    domain: ground
    synthetic: {domain: ground, seed: 3, sequences: {train: 1, val: 2}, frames: 4}
  aerial:
    format: visdrone
    root: .
    domain: aerial
    synthetic: {domain: aerial, seed: 3, sequences: {train: 1, val: 1}, frames: 4}
stages:
  - {name: Ground, config: two.yaml, data: [{source: ground, videos: 1}], weights: base.pth}
  - {name: Aerial, config: two.yaml, data: [{source: aerial, videos: 1}]}
"""
RAWS = {
    "dance": {"pedestrian": ("pedestrian",)},
    "ground": {"pedestrian": ("pedestrian",), "car": ("car",)},
    "aerial": {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")},
}


def write(folder: Path, domains: str = "") -> Path:
    (folder / "two.yaml").write_text(STAGE)
    (folder / "one.yaml").write_text(STAGE.replace("NUM_CLASSES: 2", "NUM_CLASSES: 1"))
    path = folder / "curriculum.yaml"
    path.write_text(SOURCES + domains)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """Two trained stages and scores of all three domains, with an MLflow database."""
    folder = tmp_path_factory.mktemp("domains")
    path = write(folder)
    config = load_config(folder / "one.yaml")
    save_checkpoint(
        folder / "base.pth",
        model=fresh_model(config),
        classes=config.class_names,
        config=config.to_dict(),
        epoch=0,
        step=0,
    )
    lineage = lineage_on(folder / "storage")
    result, ui, _ = run(path, folder / "storage", lineage=lineage)
    return SimpleNamespace(folder=folder, path=path, storage=folder / "storage", lineage=lineage, result=result, ui=ui)


@pytest.fixture
def again(finished, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """Run the finished curriculum again with other `domains:` and a scripted tracker.

    Earlier scores are deleted; training is not repeated.
    """
    calls: list[tuple[str, str]] = []

    def track(self: VideoTracker, video: VideoEntry):
        calls.append((sha256s.get(self.sha256, "base"), f"{video.source}/{video.video}"))
        if len(calls) == dies_at[0]:
            raise RuntimeError("power cut")
        found = truth(video, self.storage, self.classes, blind.get(sha256s.get(self.sha256, "base"), {}))
        return found, {"frames": video.frames, "seconds": 0.0, "counters": {}, "notes": []}

    def init(self: VideoTracker, subject, storage: str, device: str, threads: int | None = None) -> None:
        self.sha256, self.classes, self.storage = subject.sha256, subject.classes, storage

    monkeypatch.setattr(VideoTracker, "__init__", init)
    monkeypatch.setattr(VideoTracker, "track", track)
    sha256s = {record.sha256: record.stage for record in finished.result.records}
    blind: dict[str, dict[str, set[str]]] = {}
    dies_at = [0]

    def start(
        domains: str = "",
        blind_to: dict[str, dict[str, set[str]]] | None = None,
        *,
        dies: int = 0,
        fresh: bool = True,
        lineage: Lineage | None = None,
    ):
        if fresh:
            shutil.rmtree(finished.storage / "evaluations", ignore_errors=True)
            for kept in (finished.storage / "curricula").rglob("domains.*"):
                kept.unlink()
        calls.clear()
        blind.clear()
        blind.update(blind_to or {})
        dies_at[0] = dies
        write(finished.folder, domains)
        result, ui, _ = run(finished.path, finished.storage, lineage=lineage)
        assert ui.begun == []
        return result.domains, ui, list(calls)

    yield start
    write(finished.folder)


def truth(video: VideoEntry, storage: str, classes: tuple[str, ...], blind: dict[str, set[str]]) -> TrackRows:
    """The labels of a video as tracker rows, without the classes it is blind to in the video's source."""
    raws = {name: value for name, value in RAWS[video.source].items() if name in classes}
    class_map = ClassMap(classes, raws)
    parts = []
    for frame in read_labels(entry_path(storage, video)).frames:
        boxes, ids, class_ids, _ = class_map.split(frame)
        keep = np.array([classes[number] not in blind.get(video.source, ()) for number in class_ids], bool)
        parts.append((np.full(int(keep.sum()), frame.number), ids[keep], boxes[keep], class_ids[keep]))
    frames, ids, boxes, class_ids = (np.concatenate([part[index] for part in parts]) for index in range(4))
    return TrackRows(frames, ids, boxes.astype(np.float32), np.ones(len(ids), np.float32), class_ids)


def client_of(lineage: Lineage):
    return lineage._store.client()


def artifact(finished, run_id: str, name: str) -> bytes:
    return Path(client_of(finished.lineage).download_artifacts(run_id, name)).read_bytes()


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_each_row_has_the_domains_its_model_has_seen(finished) -> None:
    matrix = finished.result.domains.matrix
    assert matrix.stages == ("base", "Ground", "Aerial")
    assert {stage: set(cells) for stage, cells in matrix.values.items()} == {
        "base": {"dance"},
        "Ground": {"dance", "ground"},
        "Aerial": {"dance", "ground", "aerial"},
    }
    scores = json.loads((Path(finished.result.records[1].checkpoint).parent / "domains.json").read_text())["scores"]
    assert (
        scores["ground"]["ground"]["protocol"] == "bdd100k" and scores["dance"]["dance"]["protocol"] == "motchallenge"
    )
    assert len(scores["ground"]["ground"]["sequences"]) == 2
    assert any("5 of 5 videos tracked" in note for note in finished.ui.notes)


def test_mlflow_has_metrics_table_and_heat_map(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow's load_table uses the global address, not that of its client.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.lineage.tracking_uri)
    client, run_id, matrix = client_of(finished.lineage), finished.result.run_id, finished.result.domains.matrix
    parent = client.get_run(run_id).data
    assert parent.metrics["R/Aerial/ground"] == pytest.approx(matrix.values["Aerial"]["ground"])
    assert {"R/base/dance", "R/Ground/dance", "R/Ground/ground/car", "R/Aerial/aerial"} <= set(parent.metrics)
    assert [point.step for point in client.get_metric_history(run_id, "R/dance")] == [0, 1, 2]
    assert "backward_transfer" in parent.metrics
    table = client.load_table(finished.lineage._store.experiment_id, "domains/matrix.json", run_ids=[run_id])
    assert list(table["stage"]) == ["base", "Ground", "Aerial"]
    assert list(table["ground pedestrian"].notna()) == [False, True, True]
    assert artifact(finished, run_id, "domains/heatmap.png").startswith(b"\x89PNG")
    rows = artifact(finished, run_id, "domains/matrix.csv").decode().splitlines()
    assert rows[0].startswith("stage,dance,ground,ground pedestrian,ground car,aerial")
    stage = finished.result.records[1].run_id
    assert {"R/dance", "R/ground", "R/aerial", "backward_transfer"} <= set(client.get_run(stage).data.metrics)
    assert set(json.loads(artifact(finished, stage, "domains/scores.json"))) == {"dance", "ground", "aerial"}


def test_a_finished_curriculum_is_neither_tracked_nor_recorded_again(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def tracked(*_: object) -> None:
        raise AssertionError("tracked again")

    monkeypatch.setattr(evaluate_run, "track_sequence", tracked)
    folder = finished.storage / "curricula" / "small"
    before = (folder / "domains.json").read_text()
    result, ui, _ = run(finished.path, finished.storage, lineage=finished.lineage)
    assert result.domains.matrix == finished.result.domains.matrix
    assert sum("scored before" in note for note in ui.notes) == 3
    history = client_of(finished.lineage).get_metric_history(finished.result.run_id, "R/dance")
    assert [point.step for point in history] == [0, 1, 2]
    assert (folder / "domains.json").read_text() == before
    assert (folder / "domains.png").read_bytes().startswith(b"\x89PNG")


def test_a_class_missing_in_the_model_scores_zero(again) -> None:
    """The base model has pedestrians only; the mean is over the domain's classes in all rows."""
    domains, ui, _ = again("domains: {score: all}\n")
    matrix = domains.matrix
    assert matrix.by_class["base"]["ground"] == {"pedestrian": pytest.approx(100), "car": 0.0}
    assert matrix.values["base"]["ground"] == pytest.approx(50)
    assert matrix.values["Ground"]["ground"] == pytest.approx(100)
    assert matrix.values["Ground"]["dance"] == pytest.approx(100)
    line = next(note for note in ui.notes if note.startswith("base: HOTA"))
    assert "ground (zero-shot) 50.0 (pedestrian 100.0, car 0.0, the model has no car)" in line
    assert not matrix.is_trained_on("Ground", "aerial") and matrix.is_trained_on("Aerial", "aerial")


def test_a_zero_shot_value_is_not_compared_with(again) -> None:
    blind = {"Ground": {"aerial": {"pedestrian"}}, "Aerial": {"aerial": {"pedestrian"}}}
    domains, ui, _ = again("domains: {score: all}\n", blind)
    assert domains.matrix.values["base"]["aerial"] == pytest.approx(50)
    assert domains.matrix.by_class["Aerial"]["aerial"]["pedestrian"] == 0.0
    assert not [note for note in ui.notes if note.startswith("warning")]


def test_subsampled_videos_are_the_same_for_all_stages(again) -> None:
    _, _, calls = again("domains: {videos: 1}\n")
    by_stage = {stage: sorted(video for name, video in calls if name == stage) for stage, _ in calls}
    assert [len(videos) for videos in by_stage.values()] == [1, 2, 3]
    assert set(by_stage["base"]) <= set(by_stage["Ground"]) <= set(by_stage["Aerial"])
    _, _, more = again("domains: {videos: null}\n", fresh=False)
    assert len(more) == 1 + 2 + 2 and not set(calls) & set(more)


def test_score_none_scores_nothing(again, finished) -> None:
    domains, _, calls = again("domains: {score: none}\n")
    assert domains is None and calls == []
    assert not list((finished.storage / "curricula").rglob("domains.json"))


def test_interrupted_scoring_resumes(again, finished) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        again(dies=4)
    domains, _, calls = again(fresh=False)
    assert len(calls) == (2 + 4 + 5) - 3
    assert domains.matrix.stages == ("base", "Ground", "Aerial")


def test_a_row_with_other_inputs_is_scored_again(again, finished) -> None:
    again()
    row = Path(finished.result.records[0].checkpoint).parent / "domains.json"
    row.write_text(row.read_text().replace(json.loads(row.read_text())["inputs"], "of other weights"))
    _, ui, calls = again(fresh=False)
    assert calls == []  # the tracks depend on the weights only
    assert sum("scored before" in note for note in ui.notes) == 2
    assert any(note.startswith("Ground: HOTA") and "0 of 4 videos tracked" in note for note in ui.notes)


# ---- forgetting -----------------------------------------------------------------------------------------------------


def test_a_lost_domain_and_a_lost_class_are_reported(again, finished) -> None:
    lost = {"Ground": {"dance": {"pedestrian"}}, "Aerial": {"ground": {"pedestrian"}}}
    domains, ui, _ = again("", lost, lineage=finished.lineage)
    warnings = [note for note in ui.notes if note.startswith("warning")]
    assert warnings == [
        "warning: Ground forgot dance: HOTA 100.0 after base, 0.0 now (-100.0), allowed 5",
        "warning: Aerial forgot ground: HOTA 100.0 after Ground, 50.0 now (-50.0), allowed 5",
        "warning: Aerial forgot ground pedestrian: HOTA 100.0 after Ground, 0.0 now (-100.0), allowed 5",
    ]
    assert any("{source: dance, videos: N}" in note and "replay" in note for note in ui.notes)
    assert domains.transfer == {"base": None, "Ground": pytest.approx(-100), "Aerial": pytest.approx(-25)}
    client = client_of(finished.lineage)
    tags = client.get_run(finished.result.records[1].run_id).data.tags
    assert tags["motip.forgotten"].startswith("ground: HOTA 100.0 after Ground, 50.0 now")
    assert client.get_run(finished.result.run_id).data.metrics["backward_transfer"] == pytest.approx(-25)
    again(lineage=finished.lineage)
    tags = client.get_run(finished.result.records[1].run_id).data.tags
    assert tags["motip.forgotten"] == "nothing"


def test_a_lost_class_is_reported_although_the_mean_is_unchanged(again) -> None:
    """The mean over the classes is unchanged; only the per-class values show the loss."""
    blind = {"Ground": {"ground": {"car"}}, "Aerial": {"ground": {"pedestrian"}}}
    _, ui, _ = again("", blind)
    assert [note for note in ui.notes if note.startswith("warning")] == [
        "warning: Aerial forgot ground pedestrian: HOTA 100.0 after Ground, 0.0 now (-100.0), allowed 5"
    ]
    _, ui, _ = again("domains: {each_class: False}\n", blind)
    assert not [note for note in ui.notes if note.startswith("warning")]


def test_on_loss_stop_stops_the_curriculum_and_the_stage_stays_finished(again, finished) -> None:
    lost = {"Ground": {"dance": {"pedestrian"}}}
    with pytest.raises(MotipError, match="forgot what was learned before: dance") as caught:
        again("domains: {on_loss: stop}\n", lost, lineage=finished.lineage)
    assert "-100.0" in str(caught.value) and "{source: dance, videos: N}" in str(caught.value)
    client = client_of(finished.lineage)
    assert client.get_run(finished.result.run_id).info.status == "FAILED"
    assert client.get_run(finished.result.records[0].run_id).info.status == "FINISHED"
    folder = Path(finished.result.records[0].checkpoint).parent
    assert json.loads((folder / "stage.json").read_text())["status"] == "finished"
    rows = (finished.storage / "curricula/small/domains.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["stage", "base", "Ground"]
    # Checked again without tracking, and accepted with a larger allowed loss.
    with pytest.raises(MotipError, match="dance"):
        again("domains: {on_loss: stop}\n", lost, fresh=False)
    domains, _, calls = again(
        "domains: {on_loss: stop, allowed_loss: 100}\n", lost, fresh=False, lineage=finished.lineage
    )
    assert {stage for stage, _ in calls} == {"Aerial"} and len(domains.matrix.stages) == 3
    assert client.get_run(finished.result.run_id).info.status == "FINISHED"


def test_base_weights_without_a_tracker_have_no_row(tmp_path: Path) -> None:
    """A detector alone is a valid start of a curriculum; it has no scores to lose."""
    path = write(tmp_path, "domains: {score: all, videos: 1}\n")
    config = load_config(tmp_path / "one.yaml", ["ONLY_DETR=True"])
    save_checkpoint(
        tmp_path / "base.pth", model=fresh_model(config), classes=config.class_names, config=None, epoch=0, step=0
    )
    path.write_text(path.read_text().replace("weights: base.pth}", "weights: base.pth, val: [ground]}"))
    result, ui, _ = run(path, tmp_path / "storage", overrides=("CLIPS_PER_EPOCH=1",))
    assert result.domains.matrix.stages == ("Ground", "Aerial")
    assert any(note.startswith("base: not scored") and "detector only" in note for note in ui.notes)
    assert result.domains.transfer["Ground"] is None


# ---- domain history -------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, stages: str, domains: str = "", sources: str = SOURCES.split("stages:")[0]):
    path = write(tmp_path)
    path.write_text(f"{sources}{domains}stages:\n{stages}")
    return load_curriculum(path)


REPLAY = (
    "  - {name: A, config: two.yaml, data: [{source: ground, videos: 1}, {source: dance, videos: 1}], weights: b.pth}\n"
    "  - {name: B, config: two.yaml, data: [{source: aerial, videos: 1}, {source: ground, videos: 1}]}\n"
)


def test_a_replayed_domain_keeps_the_stage_that_learned_it(tmp_path: Path) -> None:
    curriculum = planned(tmp_path, REPLAY)
    a, b = curriculum.stages
    assert base_domains(curriculum, a) == {"dance"}
    assert seen_after(curriculum, a) == {"dance", "ground"}
    assert learned_in(curriculum, b, "base") == {"dance": "base", "ground": "A", "aerial": "B"}


def test_fresh_weights_have_seen_only_untrained_domains(tmp_path: Path) -> None:
    a, b = (curriculum := planned(tmp_path, REPLAY.replace("weights: b.pth", "initialise: one.yaml"))).stages
    assert base_domains(curriculum, a) == set()
    assert learned_in(curriculum, b, None) == {"dance": "A", "ground": "A", "aerial": "B"}


def test_base_domains_can_be_given_in_the_file(tmp_path: Path) -> None:
    a, _ = (curriculum := planned(tmp_path, REPLAY, "domains: {base: [ground]}\n")).stages
    assert base_domains(curriculum, a) == {"ground"}
    assert learned_in(curriculum, a, "base") == {"ground": "A", "dance": "A"}


def test_a_stage_with_its_own_base_weights_has_not_seen_earlier_stages(tmp_path: Path) -> None:
    curriculum = planned(
        tmp_path,
        "  - {name: A, config: two.yaml, data: [{source: ground, videos: 1}], weights: b.pth}\n"
        "  - {name: B, config: two.yaml, data: [{source: aerial, videos: 1}], weights: b.pth}\n",
    )
    assert seen_after(curriculum, curriculum.stages[1]) == {"dance", "aerial"}


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        ("domains: {allowed: 5}\n", "unknown key allowed"),
        ("domains: 5\n", "block of"),
        ("domains: {metric: HTOA}\n", "unknown metric"),
        ("domains: {allowed_loss: -1}\n", "allowed_loss"),
        ("domains: {on_loss: shout}\n", "on_loss"),
        ("domains: {videos: 0}\n", "videos"),
        ("domains: {base: [sea]}\n", "base"),
    ],
)
def test_invalid_domain_settings_are_an_error(tmp_path: Path, domains: str, words: str) -> None:
    with pytest.raises(MotipError, match=words) as caught:
        planned(tmp_path, REPLAY, domains)
    assert "curriculum.yaml" in str(caught.value)


def test_an_unscorable_base_domain_and_a_stage_named_base_are_errors(tmp_path: Path) -> None:
    no_dance = "name: small\nsources:\n  ground:" + SOURCES.split("  ground:")[1].split("stages:")[0]
    stage = "  - {name: A, config: two.yaml, data: [{source: ground, videos: 1}], weights: b.pth}\n"
    with pytest.raises(MotipError, match="no source of the domain dance"):
        planned(tmp_path, stage, "domains: {base: [dance]}\n", no_dance)
    with pytest.raises(MotipError, match="name of the base weights"):
        planned(tmp_path, stage.replace("name: A", "name: base"))


def test_the_row_of_given_weights_depends_on_the_classes_given_by_the_stage(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curriculum = load_curriculum(finished.path)
    domains = domain_scores.domain_set(curriculum, Manifest.load(finished.storage), ["dance"])
    options, ui = SimpleNamespace(storage=str(finished.storage)), SimpleNamespace(note=lambda text: None)
    session = SimpleNamespace(options=options, ui=ui, cluster=None)
    found = {"scores": finished.result.domains.rows["base"].scores["dance"], "videos": 2, "reused": 2, "notes": ()}
    monkeypatch.setattr(domain_scores, "evaluate_videos", lambda *_, **__: SimpleNamespace(**found))

    def row(named: tuple[str, ...] | None) -> domain_scores.DomainScores:
        subject = SimpleNamespace(classes=named or ("pedestrian",), settings=TrackerSettings())
        config = curriculum.stages[0].config
        path = tmp_path / "domains.json"
        scored = domain_scores.ScoredModel("base", config, "0" * 64, lambda: subject, named)  # type: ignore[arg-type,return-value]
        made = domain_scores.score_domains(session, scored, domains, path)  # type: ignore[arg-type]
        made.save(path)
        return made

    assert row(None).missing_classes == {} and row(None).reused
    other = row(("dancer",))
    assert not other.reused and other.missing_classes == {"dance": ("pedestrian",)}
    assert row(("dancer",)).reused and not row(None).reused


def test_base_weights_are_identified_by_their_digest(finished) -> None:
    sha256 = sha256_file(finished.folder / "base.pth")
    run(finished.path, finished.storage, lineage=finished.lineage)
    assert (finished.storage / "curricula/small/base" / sha256[:12] / "domains.json").is_file()
