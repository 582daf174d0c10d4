"""Checkpoints and exports: bit-equal round trips, plain contents, published container, tracking without YAML."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

from motip.errors import MotipError
from motip.model import MOTIP, ModelSpec
from motip.storage.atomic import sha256_file
from motip.weights import load_checkpoint, read_weights, save_checkpoint
from motip.weights.export import export_safetensors, load_for_tracking
from motip.weights.inspection import inspect_weights, read_described
from tests.helpers.weight_cases import TINY, detector_logits, detector_state, save_published, tiny_model

CONFIG = {"NUM_CLASSES": 2, "DET_THRESH": 0.35, "MISS_TOLERANCE": 20, "LR": 1e-4, "CLASSES": ["pedestrian", "car"]}
CLASSES = ("pedestrian", "car")
PARENT = {"path": "/weights/motip.pth", "sha256": "0" * 64, "run_id": "abc"}
NAMED = {**PARENT, "path": "motip.pth"}
"""The parent in an export: file name without folder."""


def trained(salt: int = 1) -> tuple[MOTIP, torch.optim.Optimizer, Any]:
    """A tiny model after one optimiser step, so that the optimiser has state."""
    model = tiny_model(salt, num_classes=2).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 9])
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


def write(path: Path, **changes: Any) -> tuple[MOTIP, Path]:
    model, optimizer, scheduler = trained()
    values: dict[str, Any] = {
        "model": model,
        "classes": CLASSES,
        "config": CONFIG,
        "epoch": 3,
        "step": 17,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": {"scale": 1024.0},
        "position": {"clip": 12, "accumulated": 1},
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        "counters": Counter(newborns_refused=3),
        "run_id": "run7",
        "parent": PARENT,
    }
    save_checkpoint(path, **{**values, **changes})
    return model, path


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    model, path = write(tmp_path / "checkpoint_3.pth")
    content = load_checkpoint(path)
    assert list(content["model"]) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(content["model"][key], tensor), key
    fresh, optimizer, scheduler = trained(salt=2)
    fresh.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    _, expected, expected_scheduler = trained()
    for entry, expected_entry in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert all(torch.equal(entry[name], expected_entry[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert scheduler.state_dict() == expected_scheduler.state_dict()
    assert (content["classes"], content["config"], content["epoch"], content["step"]) == (list(CLASSES), CONFIG, 3, 17)
    assert (content["position"], content["run_id"], content["parent"]) == (
        {"clip": 12, "accumulated": 1},
        "run7",
        PARENT,
    )
    assert content["counters"] == {"newborns_refused": 3}
    assert ModelSpec.from_dict(content["spec"]) == model.spec
    random.setstate(content["rng"]["python"])
    torch.set_rng_state(content["rng"]["torch"])
    name, keys, *rest = content["rng"]["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))


def test_container_is_the_published_one_with_plain_values(tmp_path: Path) -> None:
    _, path = write(tmp_path / "checkpoint_3.pth")
    content = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scheduler", "states"} <= set(content)
    assert content["states"] == {"start_epoch": 4, "global_step": 17}
    assert isinstance(content["scheduler"]["milestones"], Counter)


def test_aliased_tensor_is_stored_once(tmp_path: Path) -> None:
    _, path = write(tmp_path / "a.pth", optimizer=None)
    model = load_checkpoint(path)["model"]
    first, second = "detr.transformer.decoder.bbox_embed.0.layers.0.weight", "detr.bbox_embed.0.layers.0.weight"
    assert model[first].data_ptr() == model[second].data_ptr()
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.values()}
    assert path.stat().st_size < sum(distinct.values()) * 1.1 + 200_000


class Wrapped(nn.Module):
    """Stand-in for DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_and_state_dicts_keep_the_published_keys(tmp_path: Path) -> None:
    model = tiny_model(1, num_classes=2)
    for name, thing in (("w", Wrapped(model)), ("c", torch.compile(model)), ("s", model.state_dict())):
        spec = model.spec if name == "s" else None
        write(tmp_path / f"{name}.pth", model=thing, spec=spec, optimizer=None)
        assert list(load_checkpoint(tmp_path / f"{name}.pth")["model"]) == list(model.state_dict())
    with pytest.raises(MotipError, match="architecture"):
        write(tmp_path / "x.pth", model=model.state_dict())


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"position": {"when": object()}}, "checkpoint.position.when"),
        ({"rng": [{1, 2}]}, r"checkpoint.rng\[0\]"),
        ({"counters": {(1, 2): 3}}, "checkpoint.counters"),
        ({"classes": ("pedestrian",)}, "classes"),
    ],
)
def test_value_that_is_not_plain_is_an_error_and_no_file_is_left(
    tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(MotipError, match=where):
        write(tmp_path / "a.pth", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = write(tmp_path / "a.pth")
    before = sha256_file(path)

    def full_disk(content: object, target: BinaryIO) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(MotipError, match="No space left"):
        write(path, epoch=4)
    assert sha256_file(path) == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.pth"]


def test_file_that_is_not_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(MotipError, match="not a checkpoint to resume"):
        load_checkpoint(tmp_path / "a.pth")
    torch.save({"model": {}, "format": 99}, tmp_path / "b.pth")
    with pytest.raises(MotipError, match="another version"):
        load_checkpoint(tmp_path / "b.pth")
    with pytest.raises(MotipError, match="does not exist"):
        load_checkpoint(tmp_path / "c.pth")


# --- export ---------------------------------------------------------------------------------------


def test_export_round_trip_is_bit_equal_and_needs_no_yaml(tmp_path: Path) -> None:
    model, path = write(tmp_path / "checkpoint_best.pth")
    target = export_safetensors(path, tmp_path / "out")
    assert sorted(item.name for item in target.parent.iterdir()) == ["config.json", "model.safetensors"]
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(target.read_bytes())
    for source in (tmp_path / "out", target, alone):
        loaded, classes, meta = load_for_tracking(source)
        assert not loaded.training
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), (source, key)
        assert classes == CLASSES
        assert meta["thresholds"] == {"DET_THRESH": 0.35, "MISS_TOLERANCE": 20}
        assert meta["training"] == {"epoch": 3, "step": 17, "run_id": "run7"}
        assert meta["parent"] == NAMED
        assert read_described(source).meta["source"] == {"name": "checkpoint_best.pth", "sha256": sha256_file(path)}
    assert target.stat().st_size < path.stat().st_size


def test_checkpoint_and_exports_load_equally_for_tracking(tmp_path: Path) -> None:
    model, path = write(tmp_path / "checkpoint_best.pth")
    export_safetensors(path, tmp_path / "out")
    expected = detector_logits(model.eval())
    for source in (path, tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        loaded, classes, meta = load_for_tracking(source)
        assert not loaded.training
        assert classes == CLASSES
        assert meta["thresholds"] == {"DET_THRESH": 0.35, "MISS_TOLERANCE": 20}
        assert (meta["config"], meta["training"]["epoch"]) == (CONFIG, 3)
        assert meta["parent"] == (PARENT if source == path else NAMED)
        assert torch.equal(detector_logits(loaded), expected)


def test_half_precision_export_is_smaller_and_readable(tmp_path: Path) -> None:
    model, path = write(tmp_path / "a.pth")
    full = export_safetensors(path, tmp_path / "full")
    half = export_safetensors(path, tmp_path / "half", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded, _, _ = load_for_tracking(half)
    key = "id_decoder.word_to_embed.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key].half().float())
    file = read_weights(half)
    assert (file.kind, file.classes) == ("safetensors", CLASSES)
    assert sorted(file.tensors) == sorted(model.state_dict())


def test_edited_thresholds_are_used_and_a_foreign_description_is_an_error(tmp_path: Path) -> None:
    _, path = write(tmp_path / "a.pth")
    target = export_safetensors(path, tmp_path / "out")
    described = target.with_name("config.json")
    content = json.loads(described.read_text())
    content["thresholds"]["DET_THRESH"] = 0.5
    described.write_text(json.dumps(content))
    assert load_for_tracking(target)[2]["thresholds"]["DET_THRESH"] == 0.5
    described.write_text(json.dumps({**content, "classes": ["pedestrian"]}))
    with pytest.raises(MotipError, match="names 1 classes"):
        load_for_tracking(target)
    described.write_text(json.dumps({**content, "weights_sha256": "f" * 64}))
    with pytest.raises(MotipError, match="describes other weights"):
        load_for_tracking(tmp_path / "out")
    described.write_text("{")
    with pytest.raises(MotipError, match="cannot be read"):
        load_for_tracking(tmp_path / "out")
    described.unlink()
    with pytest.raises(MotipError, match="contains no exported weights"):
        load_for_tracking(tmp_path / "out")


# --- tracking from published files ----------------------------------------------------------------


def config_of(spec: ModelSpec, classes: tuple[str, ...], **values: Any) -> Any:
    """An object with the upper-case keys that ModelSpec and tracking read."""
    from motip.model.spec import _CONFIG_KEYS, _FIXED_KEYS

    keys = {key: getattr(spec, name) for name, key in _CONFIG_KEYS.items()}
    fixed = {key: supported for key, (supported, _) in _FIXED_KEYS.items()}
    return SimpleNamespace(
        **{**keys, **fixed, "LR": 1e-4, "backbone_lr_scale": 0.1, "class_names": classes, **values},
        to_dict=lambda: dict(values),
    )


def test_published_file_loads_with_its_configuration(tmp_path: Path) -> None:
    parent = tiny_model(1)
    path = save_published(tmp_path / "motip.pth", parent)
    with pytest.raises(MotipError, match="contains no architecture") as caught:
        load_for_tracking(path)
    assert "--config_path" in str(caught.value.fix)
    model, classes, meta = load_for_tracking(path, config_of(TINY, ("person",), DET_THRESH=0.4))
    assert classes == ("person",)
    assert meta["thresholds"] == {"DET_THRESH": 0.4}
    assert meta["training"] == {"epoch": 2, "step": 9}
    assert torch.equal(detector_logits(model), detector_logits(parent))
    target = export_safetensors(path, tmp_path / "out", config=config_of(TINY, ("person",)))
    assert load_for_tracking(target)[1] == ("person",)


def test_detector_only_file_is_an_error_for_tracking(tmp_path: Path) -> None:
    path = save_published(tmp_path / "d.pth", detector_state(tiny_model(1)))
    with pytest.raises(MotipError, match="detector only"):
        load_for_tracking(path, config_of(TINY, ("pedestrian",)))


def test_differences_to_the_configuration(tmp_path: Path) -> None:
    model, path = write(tmp_path / "a.pth")
    with pytest.raises(MotipError, match="classes of the checkpoint differ") as caught:
        load_for_tracking(path, config_of(model.spec, ("car", "pedestrian")))
    assert (caught.value.found, caught.value.expected) == ("pedestrian, car", "car, pedestrian")
    other = config_of(model.spec, ("person", "car"), USE_AUX_LOSS=True, DET_THRESH=0.1)
    _, classes, meta = load_for_tracking(path, other)
    assert classes == CLASSES
    assert meta["config_differences"] == {"use_aux_loss": [False, True]}
    assert meta["thresholds"]["DET_THRESH"] == 0.1
    with pytest.raises(MotipError, match="do not fit the model"):
        load_for_tracking(
            save_published(tmp_path / "b.pth", model), config_of(TINY, CLASSES, NUM_CLASSES=2, DETR_ENC_LAYERS=2)
        )


def test_weights_that_would_have_to_grow_are_an_error_for_tracking(tmp_path: Path) -> None:
    path = save_published(tmp_path / "b.pth", tiny_model(1))
    with pytest.raises(MotipError, match="do not fit the expected architecture") as caught:
        load_for_tracking(path, config_of(TINY, ("pedestrian",), NUM_ID_VOCABULARY=20))
    assert "8 -> 20" in str(caught.value.found)


# --- inspect --------------------------------------------------------------------------------------


def test_inspection_of_a_checkpoint_and_its_export(tmp_path: Path) -> None:
    model, path = write(tmp_path / "a.pth")
    facts = inspect_weights(path)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["architecture"] == model.spec.to_dict()
    assert (facts["classes"], facts["vocabulary"], facts["rel_pe_length"]) == (list(CLASSES), 8, 6)
    assert facts["training"] == {"epoch": 3, "step": 17, "run_id": "run7"}
    assert facts["parent"] == PARENT
    assert facts["sha256"] == sha256_file(path)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    assert facts["parameters"] == sum(p.numel() for p in model.parameters()) + buffers
    assert facts["tensors"] == len(model.state_dict()) > facts["distinct_tensors"]
    assert {"optimizer", "scheduler", "rng"} <= set(facts["holds"])
    exported = inspect_weights(export_safetensors(path, tmp_path / "out").parent)
    for key in ("architecture", "classes", "vocabulary", "training", "parameters"):
        assert exported[key] == facts[key], key
    assert exported["parent"] == NAMED


def test_inspection_derives_sizes_of_a_published_file_from_shapes(tmp_path: Path) -> None:
    model = tiny_model(1, num_classes=3)
    facts = inspect_weights(save_published(tmp_path / "a.pth", model))
    assert (facts["architecture_from"], facts["classes"], facts["class_rows"]) == ("shapes", None, 3)
    stored = model.spec.to_dict()
    assert all(stored[name] == value for name, value in facts["architecture"].items())
    assert len(facts["architecture"]) >= 11
    detector = inspect_weights(save_published(tmp_path / "d.pth", detector_state(model)))
    assert detector["vocabulary"] is None and detector["kind"] == "detector"


def test_importing_the_package_loads_no_engine(repo_root: Path) -> None:
    code = (
        "import sys; import motip.weights, motip.weights.export; "
        "bad = {'ray', 'mlflow', 'cv2', 'pyarrow', 'yaml', 'pydantic', 'rich', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_digest_does_not_depend_on_the_file_name(tmp_path: Path) -> None:
    _, one = write(tmp_path / "checkpoint_3.pth", rng=None)
    _, other = write(tmp_path / "elsewhere" / "checkpoint_best.pth", rng=None)
    assert sha256_file(one) == sha256_file(other)
