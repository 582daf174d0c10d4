"""The detector against the published code: final outputs at full size, every intermediate tensor at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motip.model import MOTIP, build_model
from motip.model.detector import DetectorOutput
from motip.model.preprocess import normalise
from motip.model.spec import ModelSpec
from tests.parity.recipe import fill, image, padded_batch
from tests.parity.sizes import largest_difference, reference_files, tiny_spec


def _batch(file: Any) -> tuple[Tensor, Tensor]:
    sizes = zip(file["image_seeds"], file["image_sizes_hw"], strict=True)
    return padded_batch([image(int(seed), int(h), int(w)) for seed, (h, w) in sizes])


def _check_predictions(out: DetectorOutput, file: Any, aux: dict[str, int]) -> None:
    named = {"pred": (out.pred_logits, out.pred_boxes)} | {name: out.aux[layer] for name, layer in aux.items()}
    for name, (logits, boxes) in named.items():
        assert largest_difference(logits, file[f"{name}_logits"]) < 1e-4, name
        assert largest_difference(boxes, file[f"{name}_boxes"]) < 1e-5, name
    assert largest_difference(out.outputs, file["outputs"]) < 1e-4


@pytest.mark.parametrize("path", reference_files("detector_full*.npz"))
def test_full_size_detector(path: Path) -> None:
    with np.load(path) as file:
        spec = ModelSpec(num_classes=file["pred_logits"].shape[-1], only_detr=True)
        model = fill(build_model(spec), int(file["salt"])).eval()
        images, mask = _batch(file)
        assert abs(float(images.double().sum()) - float(file["input_sum"][0])) < 0.01
        assert largest_difference(images[:, :, :4, :4], file["input_corner"]) == 0.0
        with torch.no_grad():
            out = model(images, mask)
        assert len(out.aux) == spec.dec_layers - 1
        _check_predictions(out, file, {"aux_first": 0, "aux_last": -1})


@pytest.mark.parametrize("path", reference_files("detector_tiny*.npz"))
def test_tiny_detector_and_its_intermediate_tensors(path: Path) -> None:
    with np.load(path) as file:
        spec = _spec_of(file)
        model = fill(build_model(spec), int(file["salt"])).eval()
        images, mask = _batch(file)
        assert largest_difference(images, file["input"]) == 0.0
        np.testing.assert_array_equal(mask, file["input_mask"])
        seen = _record(model)
        with torch.no_grad():
            out = model(images, mask)
        _check_predictions(out, file, {f"aux{layer}": layer for layer in range(spec.dec_layers - 1)})

        inputs = {"pred", "aux0", "outputs", "input", "image", "salt", "num"}
        names = [name for name in file.files if name.split("_")[0] not in inputs]
        assert len(names) >= 20
        for name in names:
            assert name in seen, f"{name} is in the file but was not recorded"
            tolerance = 1e-5 if "ref" in name else 1e-4
            assert largest_difference(seen[name], file[name]) < tolerance, name


def test_preprocessing_agrees_with_the_recipe() -> None:
    images = [image(3, 40, 56), image(4, 32, 48)]
    expected, mask = padded_batch(images)
    raw = torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    for index, img in enumerate(images):
        raw[index, :, : img.shape[0], : img.shape[1]] = torch.from_numpy(img).permute(2, 0, 1)
    assert (normalise(raw, mask) - expected).abs().max() < 1e-6
    # A clip is normalised like its frames.
    assert torch.equal(normalise(raw[None], mask[None])[0], normalise(raw, mask))


def _spec_of(file: Any) -> ModelSpec:
    count = lambda prefix: sum(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in file.files)  # noqa: E731
    width = file["outputs"].shape[2]
    return tiny_spec(
        num_classes=int(file["num_classes"]),
        num_queries=file["pred_logits"].shape[1],
        hidden_dim=width,
        feature_dim=width,
        enc_layers=count("enc_layer"),
        dec_layers=count("dec_layer"),
    )


def _record(model: MOTIP) -> dict[str, Tensor]:
    """Install forward hooks that record every intermediate tensor of the file by name."""
    seen: dict[str, Tensor] = {}
    detr, encoder, decoder = model.detr, model.detr.transformer.encoder, model.detr.transformer.decoder
    body, position = detr.backbone

    def after_body(_: Any, __: Any, maps: list[tuple[Tensor, Tensor]]) -> None:
        seen.update({f"backbone_l{level}": features for level, (features, _) in enumerate(maps)})

    def after_position(_: Any, args: tuple[Tensor], encoded: Tensor) -> None:
        level = sum(name.startswith("pos_l") for name in seen)
        seen.update({f"mask_l{level}": args[0], f"pos_l{level}": encoded})

    def after_encoder(_: Any, args: tuple[Any, ...], memory: Tensor) -> None:
        seen.update({"enc_pos_flat": args[1], "valid_ratios": args[3], "memory": memory})

    def after_decoder(_: Any, args: tuple[Any, ...], out: Any) -> None:
        seen.update({"init_reference": args[2], "inter_references": torch.stack(out.references_out)})

    def after_layer(name: str, reference_name: str) -> Any:
        return lambda _, args, out: seen.update({name: out, reference_name: args[2]})

    body.register_forward_hook(after_body)
    position.register_forward_hook(after_position)
    for level, projection in enumerate(detr.input_proj):
        projection.register_forward_hook(lambda _, __, out, level=level: seen.update({f"src_l{level}": out}))
    encoder.register_forward_hook(after_encoder)
    decoder.register_forward_hook(after_decoder)
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_hook(after_layer(f"enc_layer{index}", "enc_reference_points"))
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_hook(after_layer(f"dec_layer{index}", f"dec_layer{index}_ref_in"))
    return seen
