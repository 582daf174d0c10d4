"""ModelSpec: configuration keys, supported values, serialisation; imports of motip.model."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from motip.errors import MotipError
from motip.model import ModelSpec
from motip.model.spec import _CONFIG_KEYS, _FIXED_KEYS


def _config(**changes: Any) -> SimpleNamespace:
    default = ModelSpec().to_dict()
    values = {key: default[name] for name, key in _CONFIG_KEYS.items()}
    values |= {key: supported for key, (supported, _) in _FIXED_KEYS.items()}
    return SimpleNamespace(**{**values, "LR": 1e-4, "backbone_lr_scale": 0.1, **changes})


def test_the_published_configuration_is_the_default() -> None:
    assert ModelSpec.from_config(_config()) == ModelSpec()


def test_keys_set_their_fields() -> None:
    changed = {
        "NUM_CLASSES": 5,
        "BACKBONE": "tiny_gn",
        "DETR_NUM_QUERIES": 40,
        "DETR_NUM_FEATURE_LEVELS": 3,
        "DETR_HIDDEN_DIM": 64,
        "FEATURE_DIM": 64,
        "DETR_NUM_HEADS": 4,
        "DETR_ENC_LAYERS": 2,
        "DETR_DEC_LAYERS": 3,
        "DETR_DIM_FEEDFORWARD": 128,
        "DETR_DROPOUT": 0.1,
        "DETR_ENC_N_POINTS": 2,
        "DETR_DEC_N_POINTS": 3,
        "DETR_AUX_LOSS": False,
        "FFN_DIM_RATIO": 4,
        "ID_DIM": 32,
        "HEAD_DIM": 16,
        "NUM_ID_VOCABULARY": 16,
        "NUM_ID_DECODER_LAYERS": 3,
        "REL_PE_LENGTH": 32,
        "USE_AUX_LOSS": True,
        "USE_SHARED_AUX_HEAD": False,
        "USE_DECODER_CHECKPOINT": True,
    }
    spec = ModelSpec.from_config(_config(**changed))
    names = {key: name for name, key in _CONFIG_KEYS.items()}
    assert {key: getattr(spec, names[key]) for key in changed} == changed


def test_plain_values_round_trip() -> None:
    spec = ModelSpec(num_classes=4, backbone="tiny_gn", num_feature_levels=3)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(MotipError, match="unknown to this version"):
        ModelSpec.from_dict({"num_clases": 4})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DETR_WITH_BOX_REFINE", False),
        ("DETR_TWO_STAGE", True),
        ("DETR_MASKS", True),
        ("DETR_FRAMEWORK", "dab_detr"),
        ("DETR_POSITION_EMBEDDING", "learned"),
        ("BACKBONE", "resnet101"),
        ("DETR_NUM_FEATURE_LEVELS", 1),
        ("DETR_HIDDEN_DIM", 100),
        ("DETR_NUM_HEADS", 7),
        ("DETR_DEC_LAYERS", 0),
        ("DETR_DROPOUT", 1.5),
        ("NUM_CLASSES", 0),
        ("HEAD_DIM", 48),
        ("FEATURE_DIM", 128),
        ("NUM_ID_VOCABULARY", 0),
        ("REL_PE_LENGTH", 1),
    ],
)
def test_unsupported_value_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(MotipError) as caught:
        ModelSpec.from_config(_config(**{key: value}))
    assert key in str(caught.value)
    assert str(value) in str(caught.value)


def test_missing_key_is_an_error_that_names_it() -> None:
    config = _config()
    del config.REL_PE_LENGTH
    with pytest.raises(MotipError, match="REL_PE_LENGTH"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(("lr", "scale", "trained"), [(1e-4, 0.1, True), (1e-4, 0.0, False), (0.0, 0.1, False)])
def test_a_zero_backbone_rate_freezes_the_backbone(lr: float, scale: float, trained: bool) -> None:
    assert ModelSpec.from_config(_config(LR=lr, backbone_lr_scale=scale)).train_backbone is trained


def test_importing_the_model_needs_torch_only() -> None:
    unwanted = ["ray", "mlflow", "cv2", "pyarrow", "pydantic", "yaml"]
    script = f"import sys, motip.model; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
