"""State dict of the default model (keys, shapes, types, kinds, order), and parameter order of the optimiser."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from motip.model import MOTIP, ModelSpec, build_model
from tests.parity.sizes import reference_files


@pytest.fixture(scope="module")
def model() -> MOTIP:
    return build_model(ModelSpec())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _kinds(model: MOTIP) -> dict[str, str]:
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def kind(key: str) -> str:
        if key in parameters:
            return "param,trainable" if parameters[key].requires_grad else "param,frozen"
        return "buffer" if key in buffers else "alias"

    return {key: kind(key) for key in model.state_dict()}


@pytest.mark.parametrize("path", reference_files("state_dict*.tsv"))
def test_every_entry_of_the_state_dict(path: Path, model: MOTIP) -> None:
    kinds = _kinds(model)
    ours = [
        {
            "key": key,
            "shape": "x".join(str(size) for size in value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": kinds[key],
        }
        for key, value in model.state_dict().items()
    ]
    expected = _rows(path)
    assert len(ours) == len(expected)
    assert ours == expected


@pytest.mark.parametrize("path", reference_files("param_groups*.tsv"))
def test_parameters_come_in_the_published_optimiser_order(path: Path, model: MOTIP) -> None:
    rows = _rows(path)
    order = {name: index for index, (name, p) in enumerate(model.named_parameters()) if p.requires_grad}
    assert set(order) == {row["key"] for row in rows}
    for group in {row["group"] for row in rows}:
        published = [row["key"] for row in rows if row["group"] == group]
        assert published == sorted(published, key=order.__getitem__), f"group {group}"


def test_both_names_of_a_box_head_are_one_tensor(model: MOTIP) -> None:
    state = model.state_dict()
    for layer in range(6):
        for suffix in ("layers.0.weight", "layers.2.bias"):
            first = state[f"detr.transformer.decoder.bbox_embed.{layer}.{suffix}"]
            assert first.data_ptr() == state[f"detr.bbox_embed.{layer}.{suffix}"].data_ptr()


@pytest.mark.parametrize(
    ("aux", "shared", "tensors"), [(False, True, 1), (True, True, 1), (False, False, 1), (True, False, 3)]
)
def test_label_heads_are_distinct_only_with_an_unshared_aux_loss(aux: bool, shared: bool, tensors: int) -> None:
    spec = ModelSpec(backbone="tiny_gn", num_id_decoder_layers=3, use_aux_loss=aux, use_shared_aux_head=shared)
    model = build_model(spec)
    names = [name for name, _ in model.named_parameters() if "embed_to_word_layers" in name]
    assert len(names) == tensors
    assert sum("embed_to_word_layers" in key for key in model.state_dict()) == 3


def test_detector_only_model_has_no_identity_keys() -> None:
    model = build_model(ModelSpec(only_detr=True, backbone="tiny_gn", enc_layers=1, dec_layers=1))
    assert all(key.startswith("detr.") for key in model.state_dict())
    assert model.id_decoder is None and model.trajectory_modeling is None


def test_frozen_backbone_freezes_all_of_it() -> None:
    model = build_model(ModelSpec(train_backbone=False, only_detr=True, enc_layers=1, dec_layers=1))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "backbone" in n)
    assert torch.is_tensor(model.state_dict()["detr.backbone.0.body.layer4.2.bn3.running_var"])
