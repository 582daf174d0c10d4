"""The ID loss against recorded numbers: cross-entropy and focal, on recorded logits and on those of the ID decoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motip.losses.identity import count_supervised, id_loss
from tests.parity.sizes import or_skip, present, reference_files


def _loss(logits: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor, focal: bool) -> torch.Tensor:
    """Loss of a clip without its first frame, as in training; extra batches are other decoder layers."""
    layers = logits.shape[0] // labels.shape[0]
    stacked = logits.unflatten(0, (layers, labels.shape[0]))[:, :, :, 1:]
    return id_loss(stacked, labels[:, :, 1:], masks[:, :, 1:], int(count_supervised(masks).sum()), focal=focal)


@pytest.mark.parametrize("path", reference_files("id_criterion*.npz"))
def test_id_criterion(path: Path) -> None:
    with np.load(path) as stored:
        saved = dict(stored)
    cases = [match[1] for key in saved if (match := re.fullmatch(r"(\w+)_masks", key))]
    assert cases
    labels = torch.from_numpy(saved["labels"])
    for case in cases:
        masks = torch.from_numpy(saved[f"{case}_masks"])
        for kind in ("ce", "focal"):
            logits = torch.from_numpy(saved["logits"]).double().requires_grad_()
            loss = _loss(logits, labels, masks, focal=kind == "focal")
            loss.backward()
            assert torch.isfinite(logits.grad).all()
            # The published focal loss fails if all is masked; ours is 0, like the cross-entropy.
            expected = saved.get(f"{case}_{kind}", 0.0)
            np.testing.assert_allclose(loss.item(), expected, rtol=1e-5, atol=1e-12, err_msg=f"{case} {kind}")


def _decoder_cases() -> list[Any]:
    found = []
    for path in present("id_decoder_*.npz"):
        with np.load(path) as stored:
            tags = [re.fullmatch(r"(.+)_id_loss_(ce|focal)", key) for key in stored.files]
        found += [pytest.param(path, tag[1], tag[2], id=f"{path.stem}-{tag[1]}-{tag[2]}") for tag in tags if tag]
    return or_skip(found, "id_decoder_*.npz", 3)


@pytest.mark.parametrize(("path", "mode", "kind"), _decoder_cases())
def test_loss_of_decoder_logits(path: Path, mode: str, kind: str) -> None:
    with np.load(path) as stored:
        saved = {key: stored[key] for key in stored.files if key.startswith(mode)}
        clips = stored["in_unknown_id_labels"].shape[0]
    logits = torch.from_numpy(saved[f"{mode}_logits"])
    labels = torch.from_numpy(saved[f"{mode}_labels_out"])[:clips]
    masks = torch.from_numpy(saved[f"{mode}_masks_out"])[:clips]
    loss = _loss(logits, labels, masks, focal=kind == "focal")
    np.testing.assert_allclose(loss.item(), saved[f"{mode}_id_loss_{kind}"], rtol=1e-5)
