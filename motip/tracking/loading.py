"""Load a weights file as a model ready to track."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motip.errors import MotipError
from motip.model import MOTIP
from motip.tracking.settings import TrackerSettings, check_setting_names
from motip.weights.export import load_for_tracking

if TYPE_CHECKING:
    from motip.config import Config


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything needed to track.

    Attributes:
        model: the network in eval mode, on its device.
        class_names: names by class id.
        settings: thresholds, assignment protocol and frame size stored with the weights.
        meta: description read from the file: ``sha256``, ``config``, ``thresholds``, ``training``, ``parent``.
    """

    model: MOTIP
    class_names: tuple[str, ...]
    settings: TrackerSettings
    meta: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hex sha256 of the weights file."""
        return str(self.meta["sha256"])

    def with_settings(self, **changes: float | int | str | None) -> LoadedModel:
        """The same model with some fields of ``settings`` replaced; None leaves a field unchanged.

        Raises:
            MotipError: a setting is unknown or out of range.
        """
        check_setting_names(changes)
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        return replace(self, settings=replace(self.settings, **given))


def load(
    path: str | Path,
    config: str | Path | Config | None = None,
    device: str = "cpu",
    **settings: float | int | str | None,
) -> LoadedModel:
    """Load a checkpoint for tracking.

    Args:
        path: a checkpoint of this project or of the published code, a safetensors file, or an export folder.
        config: configuration or path of its YAML file; None uses the one stored in the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        settings: fields of ``TrackerSettings`` that replace the stored ones; None keeps the stored value.

    Returns:
        The model on its device in eval mode, with class names and settings.

    Raises:
        MotipError: the device does not exist (checked first), a setting is unknown or out of range, the file is missing
            or is not a MOTIP checkpoint.

    Examples:
        >>> import tempfile
        >>> from motip.model import ModelSpec, build_model
        >>> from motip.weights import save_checkpoint
        >>> spec = ModelSpec(backbone="tiny_gn", hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1,
        ...                  feature_dim=32, id_dim=32, num_id_decoder_layers=1)
        >>> path = Path(tempfile.mkdtemp()) / "tiny.pth"
        >>> _ = save_checkpoint(path, model=build_model(spec), classes=("car",), config={}, epoch=0, step=1)
        >>> loaded = load(path, det_thresh=0.4)
        >>> loaded.class_names, loaded.settings.det_thresh, loaded.model.training
        (('car',), 0.4, False)
    """
    target = resolve_device(device)
    check_setting_names(settings)
    if isinstance(config, (str, Path)):
        from motip.config import load_config  # imports the YAML parser

        config = load_config(config)
    model, class_names, meta = load_for_tracking(path, config)
    stored = TrackerSettings.from_keys({**(meta["config"] or {}), **meta["thresholds"]})
    return LoadedModel(model.to(target), class_names, stored, meta).with_settings(**settings)


def resolve_device(name: str) -> torch.device:
    """The torch device of a ``--device`` value; ``auto`` is CUDA if available, else the CPU.

    Raises:
        MotipError: the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device is None or (str(device) not in available and not (name == "cuda" and len(available) > 1)):
        raise MotipError(
            "there is no such device", where="--device", found=name, expected="auto or one of " + ", ".join(available)
        )
    return device
