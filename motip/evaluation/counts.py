"""Counts per sequence and class, stored with the scores: the fields from which TrackEval combines sequences.

Percentages of sequences cannot be averaged into those of a set; scores of any set are computed from these counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Counts = dict[str, dict[str, Any]]
"""Raw results of one cell: metric family -> TrackEval field -> number or array over thresholds."""

_ALPHAS = 19
"""Localisation thresholds of HOTA, 0.05 to 0.95 (Luiten et al., IJCV 2021)."""

HOTA_COUNTS = ("HOTA_TP", "HOTA_FN", "HOTA_FP")
HOTA_SHARES = ("AssA", "AssRe", "AssPr", "LocA")
CLEAR_FIELDS = ("CLR_TP", "CLR_FN", "CLR_FP", "IDSW", "MT", "PT", "ML", "Frag", "CLR_Frames", "MOTP_sum")
IDENTITY_FIELDS = ("IDTP", "IDFN", "IDFP")

FIELDS = {"HOTA": (*HOTA_COUNTS, *HOTA_SHARES), "CLEAR": CLEAR_FIELDS, "Identity": IDENTITY_FIELDS}
"""Stored fields of each metric family."""

_FLOATS = {*HOTA_SHARES, "MOTP_sum"}
_EMPTY: Counts = {
    family: dict.fromkeys(fields, [0] * _ALPHAS if family == "HOTA" else 0) for family, fields in FIELDS.items()
}

StoredCell = dict[str, dict[str, Any]] | None
"""A cell as JSON: lists and numbers; None without ground truth and predictions."""


def to_stored(counts: Counts) -> StoredCell:
    """The fields needed to combine sequences, as JSON-serialisable values."""
    if not any(counts["CLEAR"][field] for field in ("CLR_TP", "CLR_FN", "CLR_FP")):
        return None
    return {
        family: {
            field: np.asarray(counts[family][field]).astype(np.float64 if field in _FLOATS else np.int64).tolist()
            for field in fields
        }
        for family, fields in FIELDS.items()
    }


def from_stored(stored: Mapping[str, Mapping[str, Any]] | None) -> Counts:
    """Inverse of ``to_stored``; None becomes zeros, which change no sum or weighted mean.

    Raises:
        KeyError: a field is missing.
    """
    given = _EMPTY if stored is None else stored
    cell = {family: {field: given[family][field] for field in fields} for family, fields in FIELDS.items()}
    cell["HOTA"] = {field: np.asarray(value, np.float64).reshape(_ALPHAS) for field, value in cell["HOTA"].items()}
    return cell
