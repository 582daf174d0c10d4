"""Hand what a run tells to MLflow: metrics, tags, artifacts, tables, models, the end."""

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
"""MLflow takes at most this many metrics in one request."""


ATTACHED = ("artifact", "table")
"""Kinds of entries without which the curves and the end of a run are whole."""


def refusal_of_all(store: Store) -> Unreachable | None:
    """Why MLflow takes nothing now, where it refuses a mere question too; None where it answers one.

    A proxy says 403 or 404 of everything while the MLflow behind it is started again.
    """
    try:
        with store.errors():
            store.client().get_experiment(store.experiment_id)
    except Unreachable as error:
        return error
    except Exception as error:
        told = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
        return Unreachable(f"it refuses everything: {told}")
    return None


def batch_of(entries: list[Entry], most: int) -> list[Entry]:
    """Up to ``most`` metric entries from the front (one request takes many points), else the first entry."""
    batch: list[Entry] = []
    points = 0
    for entry in entries[:most]:
        points += len(entry.get("points", ()))
        if entry["kind"] != "metrics" or (batch and points > BATCH_METRICS):
            break
        batch.append(entry)
    return batch or entries[:1]


def hand_over(store: Store, spool: Spool, run_id: str, entries: list[Entry]) -> None:
    """Deliver entries of one kind. Safe to repeat: an answer may get lost after the server has acted.

    Raises:
        Unreachable: MLflow cannot take them now.
        MotipError: it never will.
    """
    entry = entries[0]
    with store.errors():
        client = store.client()
        if entry["kind"] == "metrics":
            from mlflow.entities import Metric

            points = [Metric(*point) for each in entries for point in each["points"]]
            for start in range(0, len(points), BATCH_METRICS):
                client.log_batch(run_id, metrics=points[start : start + BATCH_METRICS])
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


def hand_over_points(store: Store, spool: Spool, run_id: str, entry: Entry) -> bool:
    """Deliver the points of a refused entry one by one; the entry keeps those that are refused.

    Returns:
        Whether all were taken.

    Raises:
        Unreachable: MLflow cannot take them now; the entry is as it was.
    """
    if len(entry["points"]) < 2:
        return False
    try:
        with store.errors():
            if find_run(store.client(), run_id) is None:
                return False  # it is not the points that are refused
    except Unreachable:
        raise
    except Exception:
        return False
    refused = []
    for point in entry["points"]:
        try:
            hand_over(store, spool, run_id, [{**entry, "points": [point]}])
        except Unreachable:
            raise
        except Exception:
            refused.append(point)
    entry["points"] = refused
    return not refused


def _list_table(listed: str, name: str) -> str:
    """The list of a run's tables with one more, as MLflow keeps it; empty where nothing is to change.

    A list without room stays as it is, also one that was cut and cannot be read: the file is attached all the same,
    only MLflow's page of tables does not offer it.
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
            "the file that was kept for this artifact is missing",
            where=spool.folder,
            found=entry["path"],
            fix="attach it by hand, if it is still anywhere (mlflow artifacts log-artifact)",
        )
    client.log_artifact(run_id, str(path), entry["folder"] or None)
