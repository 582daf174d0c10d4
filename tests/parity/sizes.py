"""Reference files, and the network each was computed with (from the arrays of the file)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motip.model import ModelSpec

ROOT = Path(__file__).resolve().parents[2]


def directory() -> Path:
    return Path(os.environ.get("MOTIP_REFERENCE_DIR", ROOT / "../shared/reference")).resolve()


def present(pattern: str) -> list[Path]:
    """Reference files of one kind; empty without a reference directory."""
    return sorted(directory().glob(pattern))


def or_skip(cases: list[Any], what: str, values: int = 1) -> list[Any]:
    """`cases` of a parametrised test with `values` parameters, or one skipped case that names the missing files."""
    reason = f"no {what} in {directory()}; set MOTIP_REFERENCE_DIR to a folder that contains it"
    return cases or [pytest.param(*[None] * values, marks=pytest.mark.skip(reason), id="absent")]


def reference_files(pattern: str) -> list[Any]:
    """Parameters of a test: files of one kind."""
    return or_skip([pytest.param(path, id=path.stem) for path in present(pattern)], pattern)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def largest_difference(found: Tensor, expected: np.ndarray) -> float:
    """Largest absolute difference; shapes must agree, so that broadcasting cannot hide an error."""
    assert tuple(found.shape) == expected.shape
    return float((found.detach().double() - tensor(expected).double()).abs().max()) if expected.size else 0.0


def tiny_spec(**changes: Any) -> ModelSpec:
    """The TINY network of the fixtures' README."""
    sizes: dict[str, Any] = {
        "enc_layers": 2,
        "dec_layers": 2,
        "hidden_dim": 64,
        "feature_dim": 64,
        "id_dim": 64,
        "num_queries": 50,
        "dim_feedforward": 128,
        "num_id_decoder_layers": 2,
        "num_id_vocabulary": 12,
        "rel_pe_length": 10,
    }
    return ModelSpec(**{**sizes, **changes})


def id_decoder_spec(file: Any, **changes: Any) -> ModelSpec:
    """The identity half's sizes stored in an id_decoder_*.npz (with a minimal detector)."""
    dim = int(file["cfg_feature_dim"])
    sizes: dict[str, Any] = {
        "hidden_dim": dim,
        "feature_dim": dim,
        "id_dim": int(file["cfg_id_dim"]),
        "head_dim": int(file["cfg_head_dim"]),
        "num_id_vocabulary": int(file["cfg_vocab"]),
        "num_id_decoder_layers": int(file["cfg_layers"]),
        "rel_pe_length": int(file["cfg_rel_pe_length"]),
        "backbone": "tiny_gn",
        "enc_layers": 1,
        "dec_layers": 1,
        "num_queries": 1,
    }
    return ModelSpec(**{**sizes, **changes})
