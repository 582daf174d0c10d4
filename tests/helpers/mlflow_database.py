"""MLflow databases for tests, copied from a template: creating one takes seconds, copying it does not."""

from __future__ import annotations

import atexit
import functools
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from motip.lineage import Lineage


@functools.cache
def _template() -> Path:
    storage = Path(tempfile.mkdtemp(prefix="motip-mlflow-"))
    atexit.register(shutil.rmtree, storage, ignore_errors=True)
    database = f"sqlite:///{storage}/mlflow/mlflow.db"
    Lineage(database, storage)._store.client()
    return storage / "mlflow" / "mlflow.db"


def lineage_on(storage: Path, **options: Any) -> Lineage:
    """A lineage in the database under ``storage``, which is created if there is none."""
    target = storage / "mlflow" / "mlflow.db"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_template(), target)
        with sqlite3.connect(target) as opened:
            # The template's experiment has its artifacts beside the template.
            locations = (_template().parent.as_uri(), target.parent.as_uri())
            opened.execute("update experiments set artifact_location = replace(artifact_location, ?, ?)", locations)
    return Lineage(f"sqlite:///{target}", storage, **options)
