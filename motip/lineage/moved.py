"""A storage folder that was moved: its database holds the places of artifacts absolute, and they are made to follow."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import urllib.parse
from pathlib import Path

from motip.errors import MotipError

logger = logging.getLogger(__name__)

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_PLACE = re.compile(r"(?P<base>(file://)?/.*/mlflow/artifacts)(?P<rest>/.*)?")
"""How a place in a storage ends: storage/mlflow/artifacts, and what lies in it."""


def follow(database: Path, recorded: str, artifacts: Path) -> None:
    """Make the places of artifacts in a database those under ``artifacts``, where the storage was moved.

    A run whose artifacts still lie in the old place, and not in the new one, is left alone.

    Args:
        database: SQLite file in the same folder as ``artifacts``.
        recorded: place of the experiment's artifacts as it stands in the database.
        artifacts: ``storage/mlflow/artifacts``, absolute.

    Raises:
        MotipError: the database cannot be changed.
    """
    place = _PLACE.fullmatch(recorded)
    before = None if place is None or place["rest"] else _path(place["base"])
    if before is None or before.resolve() == artifacts:
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as opened:
            opened.execute("begin immediate")
            changed = sum(_rewrite(opened, table, column, artifacts) for table, column in _COLUMNS)
            opened.execute("commit")
    except sqlite3.Error as error:
        raise MotipError(
            f"the storage was moved, and its database cannot be brought up to date: {error}",
            where=database,
            found=f"artifacts recorded at {before}",
            expected=f"artifacts at {artifacts}",
            fix="make the database writable, or move the storage back",
        ) from error
    logger.warning(
        "the storage was moved from %s to %s: %d places of artifacts in its database are the new ones now",
        *(before.parents[1], artifacts.parents[1], changed),
    )


def _rewrite(opened: sqlite3.Connection, table: str, column: str, artifacts: Path) -> int:
    changed = 0
    rows = opened.execute(f"select distinct {column} from {table} where {column} like '%/mlflow/artifacts%'")
    for (text,) in rows.fetchall():
        place = _PLACE.fullmatch(text)
        if place is None:
            continue
        rest = place["rest"] or ""
        # os.path.exists takes a folder of somebody else, which must not be looked into, for one that is not there.
        old, new = _path(text), _path(artifacts.as_uri() + rest)
        if old == new or (table != "experiments" and os.path.exists(old) and not os.path.exists(new)):
            continue
        told = opened.execute(
            f"update {table} set {column} = ? where {column} = ?",
            (artifacts.as_uri() + rest, text),
        )
        changed += told.rowcount
    return changed


def _path(place: str) -> Path:
    """The path of a place that is one, or a file URI."""
    return Path(urllib.parse.unquote(place.removeprefix("file://")) if place.startswith("file://") else place)
