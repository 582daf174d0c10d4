"""Weights files: read any file MOTIP can start from, transfer it into a model, write checkpoints.

* `load_pretrained` fills a model from a file in one call. Its steps: `read_weights` returns a checked `WeightFile`,
  `plan_transfer` decides for every tensor without changing the model, `apply_transfer` copies.
* Each returns or leads to a `TransferReport`: the status of every tensor of the file and of the model.
* `save_checkpoint` and `load_checkpoint` write and read our checkpoint, the published container with extra entries.

Exports and inspection are in :mod:`motip.weights.export` and :mod:`motip.weights.inspection`.
"""

from __future__ import annotations

from motip.weights.checkpoint import load_checkpoint, save_checkpoint
from motip.weights.files import WeightFile, read_weights
from motip.weights.transfer import TransferPlan, apply_transfer, load_pretrained, plan_transfer
from motip.weights.transfer_report import TransferReport

__all__ = [
    "TransferPlan",
    "TransferReport",
    "WeightFile",
    "apply_transfer",
    "load_checkpoint",
    "load_pretrained",
    "plan_transfer",
    "read_weights",
    "save_checkpoint",
]
