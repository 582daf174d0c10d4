"""Tag names of the lineage, and parameters split to fit MLflow's limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_VALUE = 6000
"""Maximum characters of a parameter's value; MLflow truncates longer ones without an error."""
MAX_TAG = 8000
"""Maximum characters of a tag's value, truncated in the same way."""
PART = ".part"


class Tag:
    """Tag names; all but MLflow's own tags begin with ``motip.``."""

    PARENT_RUN = "mlflow.parentRunId"
    KIND = "motip.kind"
    CURRICULUM = "motip.curriculum"
    STAGE = "motip.stage"
    INPUTS = "motip.inputs"
    SEED = "motip.seed"
    DATA_SHA256 = "motip.data.sha256"
    FROM_PATH = "motip.from.path"
    FROM_RELATIVE = "motip.from.relative"
    FROM_SHA256 = "motip.from.sha256"
    FROM_RUN = "motip.from.run"
    FROM_RECORD = "motip.from.record"
    CHECKPOINT_PATH = "motip.checkpoint.path"
    CHECKPOINT_RELATIVE = "motip.checkpoint.relative"
    CHECKPOINT_SHA256 = "motip.checkpoint.sha256"
    CHECKPOINT_STEP = "motip.checkpoint.step"
    MODEL = "motip.model"
    GIT_COMMIT = "motip.git.commit"
    GIT_DIRTY = "motip.git.dirty"
    PYTHON = "motip.python"
    VERSIONS = "motip.versions"
    HARDWARE = "motip.hardware"
    DRIVER = "motip.driver"
    RESUMED = "motip.resumed"
    INTERRUPTED = "motip.interrupted"
    FORGOTTEN = "motip.forgotten"
    TABLES = "mlflow.loggedArtifacts"


def split_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Parameters for MLflow: strings unchanged, other values as JSON, long values split into ``KEY.part2`` …"""
    params = {}
    for key, value in config.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        pieces = [text[start : start + MAX_VALUE] for start in range(0, len(text), MAX_VALUE)] or [""]
        for number, piece in enumerate(pieces, start=1):
            params[key if number == 1 else f"{key}{PART}{number}"] = piece
    return params


def join_params(params: Mapping[str, str]) -> dict[str, str]:
    """Inverse of ``split_params``; values stay text."""
    joined = {key: value for key, value in params.items() if PART not in key}
    for key in joined:
        number = 2
        while f"{key}{PART}{number}" in params:
            joined[key] += params[f"{key}{PART}{number}"]
            number += 1
    return joined
