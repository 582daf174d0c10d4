"""Lineage in MLflow on SQLite: runs, inputs, models, chains, outages, simultaneous first starts."""

from __future__ import annotations

import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from motip.errors import MotipError
from motip.lineage import DataUsed, Lineage, provenance
from motip.lineage.tags import MAX_VALUE, Tag, join_params, split_params
from motip.storage.atomic import sha256_file
from motip.storage.redaction import REDACTED, redact
from tests.helpers.mlflow_database import lineage_on
from tests.helpers.mlflow_server import free_port

DIGEST = "d" * 64
CONFIG = {"LR": 1e-4, "NUM_CLASSES": 2, "sampler_lengths": [5, 8], "SEED": 42, "DETR_PRETRAIN": None, "NAME": "bdd"}


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def lineage(storage: Path) -> Lineage:
    return lineage_on(storage, patience=2, retry_interval=0.2)


def weights(storage: Path, name: str, content: str = "weights") -> tuple[Path, str]:
    path = storage / "curricula" / name / "checkpoint_best.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content} of {name}")
    return path, sha256_file(path)


def record_stage(
    lineage: Lineage, storage: Path, parent: str, stage: str, config: dict, start: dict | None, scores: dict
) -> dict:
    """Record a finished stage; returns the parent checkpoint of the next one."""
    run_id = lineage.start_stage(parent, stage, config, DIGEST, start)
    path, sha256 = weights(storage, stage)
    lineage.log_stage_result(run_id, path, sha256, scores, step=7)
    lineage.finish(run_id)
    return {"path": str(path), "sha256": sha256, "run_id": run_id}


def client_of(lineage: Lineage):  # type: ignore[no-untyped-def]
    return lineage._store.client()


def history(lineage: Lineage, run_id: str, name: str) -> dict[int, float]:
    return {point.step: point.value for point in client_of(lineage).get_metric_history(run_id, name)}


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_database_and_artifacts_lie_under_the_storage(lineage: Lineage, storage: Path, tmp_path: Path) -> None:
    before = set(Path.cwd().iterdir())
    run_id = lineage.start_curriculum("demo", {"stages": ["a"]})
    lineage.log_text(run_id, "hello", "notes/hello.txt")
    assert lineage.tracking_uri == f"sqlite:///{storage}/mlflow/mlflow.db"
    assert (storage / "mlflow" / "artifacts" / run_id / "artifacts" / "notes" / "hello.txt").read_text() == "hello"
    assert set(Path.cwd().iterdir()) == before
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import motip.lineage, sys; motip.lineage.Lineage(None, '/nowhere'); print('mlflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_stage_records_its_inputs(lineage: Lineage) -> None:
    parent = lineage.start_curriculum("demo", {"stages": ["bdd"]}, {"owner": "me"})
    used = DataUsed("bdd100k/train", "e" * 64, source={"root": "bdd100k"}, profile={"videos": 56})
    run_id = lineage.start_stage(parent, "BDD-Foundation", CONFIG, DIGEST, None, datasets=[used])
    run = client_of(lineage).get_run(run_id)
    assert run.data.params == {
        "LR": "0.0001",
        "NUM_CLASSES": "2",
        "sampler_lengths": "[5, 8]",
        "SEED": "42",
        "DETR_PRETRAIN": "null",
        "NAME": "bdd",
    }
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.data.tags[Tag.STAGE], run.data.tags[Tag.SEED]) == ("BDD-Foundation", "42")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("bdd100k/train", "e" * 32)
    assert json.loads(dataset.source)["sha256"] == "e" * 64
    assert json.loads(dataset.profile) == {"sha256": "e" * 64, "videos": 56}
    config = client_of(lineage).download_artifacts(run_id, "config.json")
    assert json.loads(Path(config).read_text()) == CONFIG


def test_a_result_becomes_an_external_model_with_an_alias(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("demo", {})
    first = record_stage(lineage, storage, parent, "BDD-Foundation", CONFIG, None, {"HOTA": 41.5, "dance/HOTA": 60})
    second = record_stage(lineage, storage, parent, "BDD-Refinement", CONFIG, first, {"HOTA": 44})
    client = client_of(lineage)
    run = client.get_run(first["run_id"])
    assert run.data.metrics == {"best_HOTA": 41.5, "best_dance/HOTA": 60.0}
    assert run.info.status == "FINISHED"
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.params == {"uri": first["path"], "sha256": first["sha256"]}
    assert run.outputs.model_outputs[0].step == 7
    version = client.get_model_version_by_alias("motip-curriculum", "bdd-foundation")
    assert (version.run_id, version.tags["sha256"]) == (first["run_id"], first["sha256"])
    assert client.get_model_version_by_alias("motip-curriculum", "bdd-refinement").run_id == second["run_id"]
    # The next stage has the model as input; the weights were not uploaded.
    inputs = client.get_run(second["run_id"]).inputs.model_inputs
    assert [each.model_id for each in inputs] == [model.model_id]
    stored = list((storage / "mlflow" / "artifacts").rglob("*.pth"))
    assert stored == []


def test_logging_a_result_twice_registers_one_model(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "vis", CONFIG, DIGEST, None)
    path, sha256 = weights(storage, "vis")
    for _ in range(2):
        lineage.log_stage_result(run_id, path, sha256, {"HOTA": 1})
    client = client_of(lineage)
    assert len(client.search_model_versions("name = 'motip-curriculum'")) == 1
    assert len(client.get_run(run_id).outputs.model_outputs) == 1
    path.write_text("trained further")
    lineage.log_stage_result(run_id, path, sha256_file(path), {"HOTA": 2})
    alias = client.get_model_version_by_alias("motip-curriculum", "vis")
    assert (len(client.search_model_versions("name = 'motip-curriculum'")), alias.tags["sha256"]) == (
        2,
        sha256_file(path),
    )


def test_an_interrupted_stage_keeps_one_run(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("demo", {"stages": ["a"]})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    lineage.log_metrics(run_id, {"loss": 3.0}, step=1)

    again = Lineage(None, storage)
    assert again.start_curriculum("demo", {"stages": ["a"]}) == parent
    cut_off = client_of(again).get_run(run_id)
    assert cut_off.info.status == "KILLED"
    assert cut_off.data.tags[Tag.INTERRUPTED]
    assert again.start_stage(parent, "a", CONFIG, DIGEST, None) == run_id
    again.log_metrics(run_id, {"loss": 2.0}, step=2)
    assert again.start_stage(parent, "a", CONFIG, DIGEST, None, resume_run_id=run_id) == run_id
    run = client_of(again).get_run(run_id)
    assert (run.info.status, run.data.tags[Tag.RESUMED]) == ("RUNNING", "2")
    assert len(run.inputs.dataset_inputs) == 1
    assert history(again, run_id, "loss") == {1: 3.0, 2: 2.0}
    again.finish(run_id)
    again.finish(parent)
    assert client_of(again).get_run(run_id).info.status == "FINISHED"

    # Other inputs or a finished run start a new run, unless reopen_finished is set.
    assert again.start_stage(parent, "a", {**CONFIG, "LR": 1}, DIGEST, None) != run_id
    assert again.start_curriculum("demo", {"stages": ["a"]}, reopen_finished=True) == parent
    again.finish(parent)
    assert again.start_curriculum("demo", {"stages": ["a"]}) != parent


def test_resuming_with_other_parameters_is_an_error_that_names_them(lineage: Lineage) -> None:
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    with pytest.raises(MotipError, match="started with other parameters: LR") as error:
        lineage.start_stage(parent, "a", {**CONFIG, "LR": 5e-5}, DIGEST, None, resume_run_id=run_id)
    assert "LR=0.0001" in str(error.value)


def _resume_stage(storage: str, config: dict, start: dict, run_id: str) -> tuple[str, list[str]]:
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("motip.lineage").addHandler(handler)
    lineage = Lineage(None, storage)
    parent = lineage.start_curriculum("demo", {})
    found = lineage.start_stage(parent, "b", config, DIGEST, start, resume_run_id=run_id)
    lineage.finish(found)
    return found, warned


def test_a_stage_continues_in_a_new_run_if_its_run_is_missing(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("demo", {})
    start = record_stage(lineage, storage, parent, "a", CONFIG, None, {"HOTA": 1.0})
    run_id = lineage.start_stage(parent, "b", CONFIG, DIGEST, start)
    # In another process, as after an interruption: this one has the deleted file open.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (storage / "mlflow" / "mlflow.db").unlink()
        found, warned = pool.apply(_resume_stage, (str(storage), CONFIG, start, run_id))
    assert found != run_id
    assert len(warned) == 1 and run_id in warned[0]
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as database:
        assert database.execute("select status from runs where run_uuid = ?", (found,)).fetchone() == ("FINISHED",)
        assert database.execute("select count(*) from runs where run_uuid = ?", (run_id,)).fetchone() == (0,)


def test_a_deleted_run_is_not_resumed(lineage: Lineage, caplog: pytest.LogCaptureFixture) -> None:
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    client_of(lineage).delete_run(run_id)
    assert lineage.start_stage(parent, "a", CONFIG, DIGEST, None, resume_run_id=run_id) != run_id
    assert f"the run {run_id} of this stage is not in MLflow" in caplog.text


def test_five_hundred_parameters_and_a_long_one(lineage: Lineage) -> None:
    config = {f"KEY_{number}": number for number in range(500)} | {"LONG": list(range(4000))}
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "a", config, DIGEST, None)
    params = client_of(lineage).get_run(run_id).data.params
    assert max(len(value) for value in params.values()) <= MAX_VALUE
    joined = join_params(params)
    assert len(joined) == 501
    assert json.loads(joined["LONG"]) == list(range(4000))


@pytest.mark.parametrize("text", ["", "x", "x" * MAX_VALUE, "x" * (MAX_VALUE + 1), "x" * (3 * MAX_VALUE)])
def test_long_parameters_are_split_and_joined(text: str) -> None:
    assert join_params(split_params({"KEY": text, "OTHER": 1})) == {"KEY": text, "OTHER": "1"}


def test_pictures_and_nan(lineage: Lineage, storage: Path) -> None:
    run_id = lineage.start_curriculum("demo", {})
    picture = storage / "loss.png"
    picture.write_bytes(b"\x89PNG")
    lineage.log_artifact(run_id, picture, "pictures/loss.png")
    picture.write_bytes(b"\x89PNG, drawn again")
    lineage.log_artifact(run_id, picture, "pictures/loss.png")
    lineage.log_metrics(run_id, {"loss": float("nan")}, step=3)
    attached = client_of(lineage).download_artifacts(run_id, "pictures/loss.png")
    assert Path(attached).read_bytes() == b"\x89PNG, drawn again"
    assert math.isnan(history(lineage, run_id, "loss")[3])
    with pytest.raises(MotipError, match="file to attach to a run is missing"):
        lineage.log_artifact(run_id, storage / "nowhere.txt")


# ---- chains ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(lineage: Lineage, storage: Path) -> tuple[str, list[dict]]:
    """A curriculum of three stages from base weights without a run."""
    parent = lineage.start_curriculum("demo", {"stages": 3})
    base, sha256 = weights(storage, "dance")
    start: dict = {"path": str(base), "sha256": sha256, "run_id": None}
    made = []
    for number, stage in enumerate(["bdd-foundation", "bdd-refinement", "vis-adaptation"]):
        config = {**CONFIG, "LR": 1e-4 / 2**number, **({"AUG": True} if number == 2 else {})}
        start = record_stage(
            lineage, storage, parent, stage, config, start, {"HOTA": 40 + number, "aerial/HOTA": number}
        )
        made.append(start)
    return parent, made


def test_chain_returns_all_steps(lineage: Lineage, chain: tuple[str, list[dict]]) -> None:
    parent, made = chain
    steps = lineage.chain(made[-1]["run_id"])
    assert [step.stage for step in steps] == ["checkpoint_best", "bdd-foundation", "bdd-refinement", "vis-adaptation"]
    assert [step.kind for step in steps] == ["weights", "stage", "stage", "stage"]
    for before, after in itertools.pairwise(steps):
        assert before.checkpoint is not None
        assert after.came_from is not None
        assert before.checkpoint.sha256 == after.came_from.sha256
    assert steps[1].config_changes == {}
    assert steps[2].config_changes == {"LR": ("0.0001", "5e-05")}
    assert steps[3].config_changes == {"LR": ("5e-05", "2.5e-05"), "AUG": (None, "true")}
    assert steps[3].scores == {"HOTA": 42.0, "aerial/HOTA": 2.0}
    assert (steps[3].data_digest, steps[3].seed, steps[3].data[0].sha256) == (DIGEST, "42", DIGEST)
    assert steps[3].versions["mlflow"]
    assert steps[3].hardware["cpus"] >= 1
    assert lineage.chain(parent) == steps


def test_chain_finds_the_run_of_weights_by_their_digest(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("demo", {})
    first = record_stage(lineage, storage, parent, "a", CONFIG, None, {"HOTA": 1})
    second = record_stage(lineage, storage, parent, "b", CONFIG, {**first, "run_id": None}, {"HOTA": 2})
    assert [step.run_id for step in lineage.chain(second["run_id"])] == [first["run_id"], second["run_id"]]


def test_verify_names_changed_and_missing_files(lineage: Lineage, chain: tuple[str, list[dict]]) -> None:
    _, made = chain
    run_id = made[-1]["run_id"]
    assert [check.state for check in lineage.verify(run_id)] == ["same"] * 4
    Path(made[0]["path"]).write_text("overwritten")
    Path(made[1]["path"]).unlink()
    checks = lineage.verify(run_id)
    assert [check.state for check in checks] == ["same", "changed", "missing", "same"]
    assert checks[1].found == sha256_file(made[0]["path"])
    assert (checks[1].stage, checks[1].path) == ("bdd-foundation", made[0]["path"])


def test_chain_and_verify_after_the_storage_was_moved(
    lineage: Lineage, chain: tuple[str, list[dict]], storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent, made = chain
    last, elsewhere = made[-1]["run_id"], tmp_path / "else where"
    lineage.log_dict(last, {"scores": {"HOTA": 42}}, "scores/epoch_0.json")
    steps = lineage.chain(last)
    shutil.move(storage, elsewhere)
    storage.write_text("a file blocks the old location")
    _artifact_repos_cache.clear()  # as in a new process
    moved = Lineage(None, elsewhere, patience=2)
    assert moved.chain(last) == steps
    checks = moved.verify(last)
    assert [check.state for check in checks] == ["same"] * 4
    assert all(check.path.startswith(str(elsewhere)) for check in checks)

    assert moved.scores(last).files == {"epoch_0.json": {"scores": {"HOTA": 42}}}
    moved.log_text(last, "added to an old run", "late.txt")
    # The curriculum resumes in the same run with a new stage, its artifacts and its model.
    assert moved.start_curriculum("demo", {"stages": 3}) == parent
    new = record_stage(moved, elsewhere, parent, "vis-specialisation", CONFIG, made[-1], {"HOTA": 50})
    artifacts = elsewhere / "mlflow" / "artifacts"
    for run_id, name in ((last, "late.txt"), (last, "config.json"), (new["run_id"], "config.json")):
        assert (artifacts / run_id / "artifacts" / name).is_file()
        assert Path(client_of(moved).download_artifacts(run_id, name)).is_file()
    for stage in ("vis-adaptation", "vis-specialisation"):
        assert client_of(moved).get_model_version_by_alias("motip-curriculum", stage).tags["stage"] == stage
    assert len(list((artifacts / "models").rglob("MLmodel"))) == 4
    assert storage.is_file(), "nothing was written to the old location"
    assert sum("the storage was moved from" in message for message in caplog.messages) == 1


def test_artifacts_left_at_the_old_location_are_found(lineage: Lineage, storage: Path, tmp_path: Path) -> None:
    stayed, moved_too = (lineage.start_curriculum(name, {"of": name}) for name in ("one", "two"))
    shutil.copytree(storage, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "mlflow" / "artifacts" / stayed)
    copy = client_of(Lineage(None, tmp_path / "copy"))
    for run_id, name in ((stayed, "one"), (moved_too, "two")):
        assert json.loads(Path(copy.download_artifacts(run_id, "curriculum.json")).read_text()) == {"of": name}


def test_chain_of_an_unknown_run_is_an_error(lineage: Lineage) -> None:
    with pytest.raises(MotipError, match="no such run"):
        lineage.chain("0" * 32)
    parent = lineage.start_curriculum("demo", {})
    with pytest.raises(MotipError, match="no stage yet"):
        lineage.chain(parent)


def test_a_cyclic_chain_is_an_error(lineage: Lineage, chain: tuple[str, list[dict]]) -> None:
    _, made = chain
    client_of(lineage).set_tag(made[0]["run_id"], Tag.FROM_RUN, made[2]["run_id"])
    with pytest.raises(MotipError, match="is cyclic"):
        lineage.chain(made[2]["run_id"])


def test_compare_hint_is_a_page_on_loopback(lineage: Lineage, storage: Path) -> None:
    command, url = lineage.compare_url_hint(["a" * 32, "b" * 32])
    assert command == f"mlflow ui --backend-store-uri sqlite:///{storage}/mlflow/mlflow.db --host 127.0.0.1 --port 5000"
    page, _, query = url.partition("?")
    assert page == "http://127.0.0.1:5000/#/compare-runs"
    runs, experiments = (json.loads(urllib.parse.unquote(part.partition("=")[2])) for part in query.split("&"))
    assert (runs, experiments) == (["a" * 32, "b" * 32], ["1"])


# ---- addresses, errors, secrets -------------------------------------------------------------------------------------


def test_addresses_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Lineage("sqlite:///runs.db", tmp_path).tracking_uri == f"sqlite:///{tmp_path}/runs.db"
    assert Lineage("sqlite:////data/runs.db", tmp_path).tracking_uri == "sqlite:////data/runs.db"
    monkeypatch.chdir(tmp_path)
    assert Lineage(None, "here").tracking_uri == f"sqlite:///{tmp_path}/here/mlflow/mlflow.db"
    assert Lineage(None, "s3://bucket/motip").tracking_uri == f"sqlite:///{Path.home()}/motip/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.invalid:5000")
    assert Lineage(None, tmp_path).tracking_uri == "http://example.invalid:5000"
    for bad in ("./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(MotipError, match="no longer stores runs in plain folders"):
            Lineage(bad, tmp_path)


def test_an_unreachable_server_at_the_start_is_an_error(tmp_path: Path) -> None:
    unreachable = Lineage(f"http://user:pa55word@127.0.0.1:{free_port()}", tmp_path, patience=1)
    with pytest.raises(MotipError, match="MLflow cannot be reached") as error:
        unreachable.start_curriculum("demo", {})
    assert "pa55word" not in str(error.value)
    assert "MLFLOW_TRACKING_URI" in str(error.value)


def test_an_invalid_database_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_text("not a database, but long enough to look at" * 50)
    with pytest.raises(MotipError, match="not a database"):
        Lineage(None, tmp_path, patience=1).start_curriculum("demo", {})


def test_an_unknown_end_state_is_an_error(lineage: Lineage) -> None:
    with pytest.raises(MotipError, match="unknown end state"):
        lineage.finish("0" * 32, "DONE")


def test_secrets_are_not_recorded(lineage: Lineage, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-value"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("MY_TOKEN", secret)
    config = {
        "root_path": f"s3://key:{secret}@bucket/data",
        "WANDB_TOKEN": secret,
        "val_config": {"URL": f"https://host/file?X-Amz-Signature={secret}&a=1", "password": secret},
    }
    parent = lineage.start_curriculum("demo", config, {"api_key": secret})
    source = DataUsed("d", DIGEST, source={"url": f"https://u:{secret}@host/x"})
    run_id = lineage.start_stage(parent, "a", config, DIGEST, None, datasets=[source])
    lineage.log_text(run_id, f"read https://u:{secret}@host/x", "log.txt")
    lineage.finish(run_id)
    for path in (storage / "mlflow").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    assert client_of(lineage).get_run(run_id).data.params["WANDB_TOKEN"] == REDACTED


def test_redaction_keeps_values_without_secrets() -> None:
    config = {"NUM_TOKENS": 5, "KEY": "a@b", "root_path": "s3://bucket/data?x=1", "LIST": [1, "x", None]}
    assert redact(config) == config


def test_provenance_does_not_record_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING_PRIVATE", "do-not-record")
    monkeypatch.setenv("MOTIP_GIT_COMMIT", "0123456789abcdef0123456789abcdef01234567-dirty")
    facts = provenance()
    assert facts["git"] == {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True}
    assert facts["versions"]["torch"][0].isdigit()
    assert "do-not-record" not in json.dumps(facts)
    monkeypatch.setenv("MOTIP_GIT_COMMIT", "$(nonsense)")
    assert provenance()["git"]["commit"] != "$(nonsense)"


# ---- outages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable(storage: Path) -> Lineage:
    """A process of the same storage that does not reach MLflow."""
    return Lineage(f"http://127.0.0.1:{free_port()}", storage, retry_interval=60)


def test_events_of_an_outage_are_delivered_later(
    lineage: Lineage, unreachable: Lineage, storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = lineage.start_curriculum("demo", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    started = time.monotonic()
    before = time.time() * 1000
    for step in range(300):
        unreachable.log_metrics(run_id, {"loss": 300.0 - step, "lr": 0.1}, step)
    after = time.time() * 1000
    path, sha256 = weights(storage, "a")
    unreachable.log_stage_result(run_id, path, sha256, {"HOTA": 50})
    unreachable.log_text(run_id, "tracks", "report/tracks.txt")
    unreachable.finish(run_id)
    assert time.monotonic() - started < 30
    assert sum("cannot be used now" in record.message for record in caplog.records) == 1
    assert history(lineage, run_id, "loss") == {}

    assert lineage.deliver_all() == 0
    points = client_of(lineage).get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 300.0 - step) for step in range(300)]
    assert all(before - 1 <= point.timestamp <= after + 1 for point in points), "their original times"
    run = client_of(lineage).get_run(run_id)
    assert (run.info.status, run.data.metrics["best_HOTA"]) == ("FINISHED", 50.0)
    assert run.data.tags[Tag.CHECKPOINT_SHA256] == sha256
    assert len(run.outputs.model_outputs) == 1
    attached = client_of(lineage).download_artifacts(run_id, "report/tracks.txt")
    assert Path(attached).read_text() == "tracks"


def test_earlier_events_are_delivered_before_new_ones(lineage: Lineage, unreachable: Lineage) -> None:
    run_id = lineage.start_curriculum("demo", {})
    unreachable.set_tags(run_id, {"state": "old"})
    lineage.set_tags(run_id, {"state": "new"})
    assert client_of(lineage).get_run(run_id).data.tags["state"] == "new"
    assert lineage.deliver_all() == 0
    assert client_of(lineage).get_run(run_id).data.tags["state"] == "new"


def test_permanently_refused_events_are_set_aside_with_a_warning(
    lineage: Lineage, unreachable: Lineage, storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = lineage.start_curriculum("demo", {})
    unreachable.set_tags(run_id, {"good": "1"})
    unreachable.log_metrics(run_id, {"no*such*name": 1.0}, 0)
    unreachable.set_tags(run_id, {"better": "2"})
    assert lineage.deliver_all() == 0
    assert client_of(lineage).get_run(run_id).data.tags["better"] == "2"
    rejected = (storage / "mlflow" / "readers" / f"{run_id}.rejected.jsonl").read_text()
    assert "no*such*name" in rejected
    assert "set aside" in caplog.text
    assert lineage.deliver_all() == 0


def test_lineage_can_be_pickled(lineage: Lineage) -> None:
    run_id = lineage.start_curriculum("demo", {})
    copy = pickle.loads(pickle.dumps(lineage))  # noqa: S301  (our own bytes)
    copy.log_metrics(run_id, {"loss": 1.0}, 1)
    assert history(lineage, run_id, "loss") == {1: 1.0}


# ---- many processes -------------------------------------------------------------------------------------------------


def _first_start(storage: str) -> str:
    lineage = Lineage(None, storage)
    run_id = lineage.start_curriculum(f"process {os.getpid()}", {"pid": os.getpid()})
    for step in range(25):
        lineage.log_metrics(run_id, {"loss": float(step)}, step)
    return run_id if lineage.deliver_all() == 0 else ""


def test_eight_simultaneous_first_starts_create_one_valid_database(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        runs = pool.map(_first_start, [str(tmp_path)] * 8, chunksize=1)
    assert len(set(runs)) == 8
    lineage = Lineage(None, tmp_path)
    assert all(history(lineage, run_id, "loss") == {step: float(step) for step in range(25)} for run_id in runs)
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        assert database.execute("select count(*) from experiments where name = 'motip-curriculum'").fetchone() == (1,)
