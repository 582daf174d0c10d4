from __future__ import annotations

from types import SimpleNamespace

import pytest

from motip.errors import MotipError
from motip.tracking.settings import _CONFIG_KEYS, TrackerSettings


def _config(**changes: object) -> SimpleNamespace:
    settings = TrackerSettings()
    values = {key: getattr(settings, name) for name, key in _CONFIG_KEYS.items()}
    return SimpleNamespace(**(values | changes))


def test_settings_from_configuration_keys() -> None:
    settings = TrackerSettings.from_config(_config(DET_THRESH=0.4, MISS_TOLERANCE=12, USE_FOCAL_LOSS=True))  # type: ignore[arg-type]
    assert (settings.det_thresh, settings.miss_tolerance, settings.use_sigmoid) == (0.4, 12, True)


def test_every_configuration_key_sets_its_field() -> None:
    changed = {
        "DET_THRESH": 0.41,
        "NEWBORN_THRESH": 0.42,
        "ID_THRESH": 0.43,
        "AREA_THRESH": 44.0,
        "MISS_TOLERANCE": 12,
        "ASSIGNMENT_PROTOCOL": "id-max",
        "MEMORY_RULE": "published",
        "NEWBORN_ORDER": "query",
        "MASK_UNUSED_LABELS": False,
        "USE_FOCAL_LOSS": True,
        "INFERENCE_SHORT_SIDE": 320,
        "INFERENCE_MAX_LONGER": 640,
        "INFERENCE_DTYPE": "BF16",
        "LONGTERM_PATIENCE": 7,
        "LONGTERM_SIMILARITY": 0.5,
        "LONGTERM_CAPACITY": 9,
    }
    assert set(changed) == set(_CONFIG_KEYS.values())
    settings = TrackerSettings.from_config(_config(**changed))  # type: ignore[arg-type]
    assert {key: getattr(settings, name) for name, key in _CONFIG_KEYS.items()} == changed


def test_exports_contain_every_tracker_key() -> None:
    from motip.weights.export import TRACKING_KEYS

    assert set(TRACKING_KEYS) == set(_CONFIG_KEYS.values())


def test_every_key_exists_in_the_configuration() -> None:
    from motip.config import Config

    assert set(_CONFIG_KEYS.values()) <= set(Config.model_fields)


@pytest.mark.parametrize("protocol", ["object-priority", "id-priority"])
def test_unsupported_assignment_protocols_are_an_error_listing_valid_ones(protocol: str) -> None:
    with pytest.raises(MotipError, match=r"hungarian \| object-max \| id-max") as error:
        TrackerSettings.from_config(_config(ASSIGNMENT_PROTOCOL=protocol))  # type: ignore[arg-type]
    assert "ASSIGNMENT_PROTOCOL" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"det_thresh": 1.5},
        {"newborn_thresh": -0.1},
        {"miss_tolerance": -1},
        {"miss_tolerance": 2, "memory_rule": "published"},
        {"max_longer": 700},
        {"dtype": "INT8"},
        {"longterm_similarity": 2.0},
        {"area_thresh": -1.0},
        {"newborn_order": "age"},
    ],
)
def test_invalid_value_error_names_the_key(changes: dict[str, object]) -> None:
    with pytest.raises(MotipError) as error:
        TrackerSettings(**changes)  # type: ignore[arg-type]
    assert _CONFIG_KEYS[next(iter(changes))] in str(error.value)


def test_history_frames_of_both_rules() -> None:
    assert TrackerSettings(miss_tolerance=30).history_frames == 31
    assert TrackerSettings(miss_tolerance=30, memory_rule="published").history_frames == 29


def test_missing_key_error_names_the_key() -> None:
    config = _config()
    del config.ID_THRESH
    with pytest.raises(MotipError, match="ID_THRESH"):
        TrackerSettings.from_config(config)  # type: ignore[arg-type]
