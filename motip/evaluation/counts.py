"""Counts per sequence and class, stored with the scores: the fields from which TrackEval combines sequences.

Percentages of sequences cannot be averaged into those of a set; scores of any set are computed from these counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Counts = dict[str, dict[str, Any]]
"""Raw results of one cell: metric family -> TrackEval field -> number or array over thresholds."""

ALPHAS = 19
"""Localisation thresholds of HOTA, 0.05 to 0.95 (Luiten et al., IJCV 2021)."""

HOTA_COUNTS = ("HOTA_TP", "HOTA_FN", "HOTA_FP")
HOTA_SHARES = ("AssA", "AssRe", "AssPr", "LocA")
CLEAR_FIELDS = ("CLR_TP", "CLR_FN", "CLR_FP", "IDSW", "MT", "PT", "ML", "Frag", "CLR_Frames", "MOTP_sum")
IDENTITY_FIELDS = ("IDTP", "IDFN", "IDFP")

StoredCell = dict[str, dict[str, Any]] | None
"""A cell as JSON: lists and numbers; None without ground truth and predictions."""


def to_stored(counts: Counts) -> StoredCell:
    """The fields needed to combine sequences, as JSON-serialisable values."""
    hota, clear, identity = counts["HOTA"], counts["CLEAR"], counts["Identity"]
    if not (clear["CLR_TP"] or clear["CLR_FN"] or clear["CLR_FP"]):
        return None
    return {
        "HOTA": {field: np.asarray(hota[field]).astype(np.int64).tolist() for field in HOTA_COUNTS}
        | {field: np.asarray(hota[field], np.float64).tolist() for field in HOTA_SHARES},
        "CLEAR": {field: int(clear[field]) for field in CLEAR_FIELDS if field != "MOTP_sum"}
        | {"MOTP_sum": float(clear["MOTP_sum"])},
        "Identity": {field: int(identity[field]) for field in IDENTITY_FIELDS},
    }


def from_stored(stored: Mapping[str, Mapping[str, Any]] | None) -> Counts:
    """Inverse of ``to_stored``; None becomes zeros, which change no sum or weighted mean.

    Raises:
        KeyError: a field is missing.
    """
    if stored is None:
        return {
            "HOTA": {field: np.zeros(ALPHAS) for field in (*HOTA_COUNTS, *HOTA_SHARES)},
            "CLEAR": dict.fromkeys(CLEAR_FIELDS, 0),
            "Identity": dict.fromkeys(IDENTITY_FIELDS, 0),
        }
    return {
        "HOTA": {
            field: np.asarray(stored["HOTA"][field], np.float64).reshape(ALPHAS)
            for field in (*HOTA_COUNTS, *HOTA_SHARES)
        },
        "CLEAR": {field: stored["CLEAR"][field] for field in CLEAR_FIELDS},
        "Identity": {field: stored["Identity"][field] for field in IDENTITY_FIELDS},
    }
