"""Trajectory modelling and ID decoder against the published code: logits, loss and gradients in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from motip.model import MOTIP, build_model
from motip.model.fast.frame_decoder import FrameDecoder, HistoryTokens
from tests.parity.recipe import fill
from tests.parity.sizes import id_decoder_spec, largest_difference, or_skip, present, reference_files, tensor

_MODES: dict[str, dict[str, bool]] = {
    "eval": {},
    "train": {},
    "train_aux_shared": {"use_aux_loss": True, "use_shared_aux_head": True},
    "train_aux_unshared": {"use_aux_loss": True, "use_shared_aux_head": False},
}


def _cases() -> list[Any]:
    cases = []
    for path in present("id_decoder_*.npz"):
        with np.load(path) as file:
            cases += [
                pytest.param(path, mode, checkpoint, id=f"{path.stem}-{mode}{'-checkpoint' * checkpoint}")
                for mode in _MODES
                if f"{mode}_logits" in file.files
                for checkpoint in ((False, True) if mode != "eval" else (False,))
            ]
    return or_skip(cases, "id_decoder_*.npz", 3)


def _forward(model: MOTIP, file: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = {side: tensor(file[f"in_{side}_features"]).requires_grad_() for side in ("trajectory", "unknown")}
    times = {}
    for side in ("trajectory", "unknown"):
        every = tensor(file[f"in_{side}_times"])
        times[side] = every[0, 0, :, 0]
        assert (every == times[side].view(1, 1, -1, 1)).all(), "a frame has one time"
    assert model.trajectory_modeling is not None and model.id_decoder is not None
    modelled = model.trajectory_modeling(features["trajectory"])
    logits = model.id_decoder(
        modelled,
        tensor(file["in_trajectory_id_labels"]),
        tensor(file["in_trajectory_masks"]),
        times["trajectory"],
        features["unknown"],
        tensor(file["in_unknown_masks"]),
        times["unknown"],
    )
    return features["trajectory"], features["unknown"], modelled, logits


@pytest.mark.parametrize(("path", "mode", "checkpointed"), _cases())
def test_id_decoder(path: Path, mode: str, checkpointed: bool) -> None:
    with np.load(path) as file:
        spec = id_decoder_spec(file, use_decoder_checkpoint=checkpointed, **_MODES[mode])
        model = fill(build_model(spec), int(file["salt"]), shared_head=mode != "train_aux_unshared")
        model.train(mode != "eval")
        past, now, modelled, logits = _forward(model, file)
        layers = logits.shape[0]
        assert layers == (spec.num_id_decoder_layers if spec.use_aux_loss else 1)
        assert largest_difference(modelled, file[f"{mode}_traj_modeled"]) < 1e-4
        assert largest_difference(logits.flatten(0, 1), file[f"{mode}_logits"]) < 1e-4
        if mode == "eval":
            return

        labels = tensor(file["in_unknown_id_labels"]).repeat(layers, 1, 1, 1)
        masks = tensor(file["in_unknown_masks"]).repeat(layers, 1, 1, 1)
        np.testing.assert_array_equal(labels, file[f"{mode}_labels_out"])
        np.testing.assert_array_equal(masks, file[f"{mode}_masks_out"])
        counted = ~masks
        counted[:, :, 0] = False
        loss = F.cross_entropy(logits.flatten(0, 1)[counted], labels[counted])
        loss.backward()

        assert loss.item() == pytest.approx(float(file[f"{mode}_id_loss_ce"]), rel=1e-5)
        assert largest_difference(past.grad, file[f"{mode}_grad_traj_features"]) < 1e-5
        assert largest_difference(now.grad, file[f"{mode}_grad_unk_features"]) < 1e-5
        parameters = dict(model.named_parameters())
        keys = [str(key) for key in file[f"{mode}_grad_keys"]]
        found = np.array([float(parameters[key].grad.norm()) for key in keys])
        np.testing.assert_allclose(found, file[f"{mode}_grad_norms"], rtol=1e-3, atol=1e-6)
        with_gradient = {n for n, p in parameters.items() if p.grad is not None and not n.startswith("detr.")}
        assert with_gradient == set(keys)


@pytest.mark.parametrize("path", reference_files("id_decoder_infer*.npz"))
def test_incremental_path_gives_the_published_logits(path: Path) -> None:
    with np.load(path) as file:
        model = fill(build_model(id_decoder_spec(file)), int(file["salt"])).eval()
        assert model.trajectory_modeling is not None and model.id_decoder is not None
        decoder = FrameDecoder(model.trajectory_modeling, model.id_decoder)
        modelled = decoder.model_trajectories(tensor(file["in_trajectory_features"])[0, 0])
        labels = tensor(file["in_trajectory_id_labels"])[0, 0]
        masks = tensor(file["in_trajectory_masks"])[0, 0]
        frames = [decoder.encode_history(x, y) for x, y in zip(modelled, labels, strict=True)]
        history = frames[0]
        for newer in frames[1:]:
            history = HistoryTokens(
                *(torch.cat([old, new[:, :, 1:]], 2) for old, new in zip(history, newer, strict=True))
            )
        ages = (tensor(file["in_unknown_times"])[0, 0, 0, 0] - tensor(file["in_trajectory_times"])[0, 0]).flatten()
        unknown = tensor(file["in_unknown_features"])[0, 0, 0]
        expected = file["eval_logits"][0, 0, 0]
        logits = decoder.decode(unknown, history, ages, history_masks=masks.flatten())
        assert largest_difference(logits, expected) < 1e-4
        # Omitting masked tokens, as the tracker does, equals masking them.
        visible = ~masks.flatten()
        seen = torch.cat([torch.ones(1, dtype=torch.bool), visible])  # token 0 stays
        shown = HistoryTokens(history.keys[:, :, seen], history.values[:, :, seen])
        logits = decoder.decode(unknown, shown, ages[visible])
        assert largest_difference(logits, expected) < 1e-4
        assert not torch.isnan(logits).any()
