"""Sends queued entries to MLflow: metrics, tags, artifacts, tables, models, run status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from motip.errors import MotipError
from motip.lineage.registered_model import find_run, register
from motip.lineage.spool import Entry, Spool
from motip.lineage.store import Store, Unreachable
from motip.lineage.tags import MAX_TAG, Tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_METRICS = 1000
"""Maximum number of metrics in one request to MLflow."""

ATTACHED = ("artifact", "table")
"""Kinds of entries that are set aside when refused; a refusal of any other kind raises."""


def probe_server(store: Store) -> Unreachable | None:
    """The reason why MLflow accepts nothing now, found by reading the experiment; None if that succeeds.

    A proxy answers 403 or 404 to every request while the MLflow behind it restarts.
    """
    try:
        with store.errors():
            store.client().get_experiment(store.experiment_id)
    except Unreachable as error:
        return error
    except Exception as error:
        reason = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
        return Unreachable(f"it refuses every request: {reason}")
    return None


def batch_of(entries: list[Entry], most: int) -> list[Entry]:
    """Up to ``most`` metric entries from the front, which fit one request; else the first entry alone."""
    batch: list[Entry] = []
    points = 0
    for entry in entries[:most]:
        points += len(entry.get("points", ()))
        if entry["kind"] != "metrics" or (batch and points > BATCH_METRICS):
            break
        batch.append(entry)
    return batch or entries[:1]


def send_entries(store: Store, spool: Spool, run_id: str, entries: list[Entry]) -> None:
    """Send entries of one kind. Idempotent: a response may be lost after the server has acted.

    Raises:
        Unreachable: MLflow cannot accept them now.
        MotipError: MLflow refuses them permanently.
    """
    entry = entries[0]
    with store.errors():
        client = store.client()
        # many entries in few requests
        if entry["kind"] == "metrics":
            from mlflow.entities import Metric

            points = [Metric(*point) for each in entries for point in each["points"]]
            for start in range(0, len(points), BATCH_METRICS):
                client.log_batch(run_id, metrics=points[start : start + BATCH_METRICS])
        # one entry
        elif entry["kind"] == "tags":
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in entry["tags"].items()])
        elif entry["kind"] == "artifact":
            _attach(client, spool, run_id, entry)
        elif entry["kind"] == "table":
            listed = _list_table(client.get_run(run_id).data.tags.get(Tag.TABLES, "[]"), entry["name"])
            if listed:
                client.set_tag(run_id, Tag.TABLES, listed)
        elif entry["kind"] == "model":
            register(store, run_id, entry["uri"], entry["sha256"], entry["step"])
        elif entry["kind"] == "damaged":
            raise MotipError("a line of the queue is damaged", where=spool.folder, found=entry["line"][:100])
        else:
            client.set_terminated(run_id, entry["status"], entry["time"])


def send_points(store: Store, spool: Spool, run_id: str, entry: Entry) -> bool:
    """Send the points of a refused entry one by one; the entry keeps the refused ones.

    Returns:
        Whether all were accepted.

    Raises:
        Unreachable: MLflow cannot accept them now; the entry is unchanged.
    """
    if len(entry["points"]) < 2:
        return False
    try:
        with store.errors():
            if find_run(store.client(), run_id) is None:
                return False  # the run is gone, so each point would be refused
    except Unreachable:
        raise
    except Exception:
        return False
    refused = []
    for point in entry["points"]:
        try:
            send_entries(store, spool, run_id, [{**entry, "points": [point]}])
        except Unreachable:
            raise
        except Exception:
            refused.append(point)
    entry["points"] = refused
    return not refused


def _list_table(listed: str, name: str) -> str:
    """MLflow's list of a run's tables with one more, as JSON; "" if the tag is not to be changed.

    The tag stays unchanged if the list is unreadable or would exceed the tag's size: the table is attached anyway, but
    MLflow's page of tables does not show it.
    """
    try:
        tables = json.loads(listed)
        known = [table["path"] for table in tables]
    except (ValueError, TypeError, KeyError):
        return ""
    text = json.dumps([*tables, {"path": name, "type": "table"}])
    return "" if name in known or len(text) > MAX_TAG else text


def _attach(client: MlflowClient, spool: Spool, run_id: str, entry: Entry) -> None:
    path = spool.file_of(entry) if entry.get("kept") else entry["path"]
    if path is None:
        raise MotipError(
            "the stored file of this artifact is missing",
            where=spool.folder,
            found=entry["path"],
            fix="attach it by hand if there is another copy (mlflow artifacts log-artifact)",
        )
    client.log_artifact(run_id, str(path), entry["folder"] or None)
