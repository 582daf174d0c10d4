"""ModelSpec: the architecture of a MOTIP network.

Our checkpoints store ``ModelSpec.to_dict()``, so that a network can be rebuilt without a configuration file; those of
the published code store no architecture. ``ModelSpec.from_config`` reads the upper-case keys of a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from motip.errors import MotipError

_BACKBONES = ("resnet50", "tiny_gn")

# Architecture switches of the published configuration with one supported value, and the reason.
_FIXED_KEYS: dict[str, tuple[Any, str]] = {
    "DETR_FRAMEWORK": ("deformable_detr", "the only detector MOTIP is published with"),
    "DETR_WITH_BOX_REFINE": (True, "every published MOTIP checkpoint refines boxes layer by layer"),
    "DETR_TWO_STAGE": (False, "no published MOTIP checkpoint has two-stage proposals"),
    "DETR_MASKS": (False, "segmentation heads are not part of MOTIP"),
    "DETR_POSITION_EMBEDDING": ("sine", "the published checkpoints have no learned position embedding"),
}

# field of ModelSpec -> configuration key
_CONFIG_KEYS = {
    "num_classes": "NUM_CLASSES",
    "backbone": "BACKBONE",
    "dilation": "DILATION",
    "num_queries": "DETR_NUM_QUERIES",
    "num_feature_levels": "DETR_NUM_FEATURE_LEVELS",
    "hidden_dim": "DETR_HIDDEN_DIM",
    "num_heads": "DETR_NUM_HEADS",
    "enc_layers": "DETR_ENC_LAYERS",
    "dec_layers": "DETR_DEC_LAYERS",
    "dim_feedforward": "DETR_DIM_FEEDFORWARD",
    "dropout": "DETR_DROPOUT",
    "enc_points": "DETR_ENC_N_POINTS",
    "dec_points": "DETR_DEC_N_POINTS",
    "detr_aux_loss": "DETR_AUX_LOSS",
    "only_detr": "ONLY_DETR",
    "feature_dim": "FEATURE_DIM",
    "ffn_dim_ratio": "FFN_DIM_RATIO",
    "id_dim": "ID_DIM",
    "head_dim": "HEAD_DIM",
    "num_id_vocabulary": "NUM_ID_VOCABULARY",
    "num_id_decoder_layers": "NUM_ID_DECODER_LAYERS",
    "rel_pe_length": "REL_PE_LENGTH",
    "use_aux_loss": "USE_AUX_LOSS",
    "use_shared_aux_head": "USE_SHARED_AUX_HEAD",
    "use_decoder_checkpoint": "USE_DECODER_CHECKPOINT",
}


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of the network; the defaults are the published DanceTrack model.

    Raises:
        MotipError: a size is out of range or contradicts another; names the configuration key.
    """

    num_classes: int = 1
    # detector
    backbone: str = "resnet50"
    dilation: bool = False
    train_backbone: bool = True
    """False freezes layer2-4 as well (LR * LR_BACKBONE_SCALE is 0)."""
    num_queries: int = 300
    num_feature_levels: int = 4
    hidden_dim: int = 256
    num_heads: int = 8
    enc_layers: int = 6
    dec_layers: int = 6
    dim_feedforward: int = 1024
    dropout: float = 0.0
    enc_points: int = 4
    dec_points: int = 4
    detr_aux_loss: bool = True
    # identity
    only_detr: bool = False
    feature_dim: int = 256
    ffn_dim_ratio: int = 2
    id_dim: int = 256
    head_dim: int = 32
    num_id_vocabulary: int = 50
    num_id_decoder_layers: int = 6
    rel_pe_length: int = 30
    use_aux_loss: bool = False
    use_shared_aux_head: bool = True
    use_decoder_checkpoint: bool = False

    def __post_init__(self) -> None:
        # Detector.
        _check_choice("BACKBONE", self.backbone, _BACKBONES)
        for name in ("num_classes", "num_queries", "dec_layers", "hidden_dim", "num_heads", "dim_feedforward"):
            _check_at_least(_CONFIG_KEYS[name], getattr(self, name), 1)
        for name in ("enc_points", "dec_points", "enc_layers"):
            _check_at_least(_CONFIG_KEYS[name], getattr(self, name), 1)
        _check_choice("DETR_NUM_FEATURE_LEVELS", self.num_feature_levels, (3, 4))
        _check_multiple("DETR_HIDDEN_DIM", self.hidden_dim, 32, "the groups of the input projections' GroupNorm")
        _check_multiple("DETR_HIDDEN_DIM", self.hidden_dim, self.num_heads, "DETR_NUM_HEADS")
        if not 0.0 <= self.dropout < 1.0:
            raise MotipError("a probability is out of range", where="DETR_DROPOUT", found=self.dropout, expected="0..1")
        if self.dilation and self.backbone != "resnet50":
            raise MotipError(
                f"BACKBONE {self.backbone} cannot be dilated", where="DILATION", found=True, fix="set DILATION: False"
            )
        # Trajectory modelling and ID decoder.
        if not self.only_detr:
            self._check_identity_half()

    def _check_identity_half(self) -> None:
        for name in ("feature_dim", "id_dim", "head_dim", "ffn_dim_ratio", "num_id_vocabulary"):
            _check_at_least(_CONFIG_KEYS[name], getattr(self, name), 1)
        _check_at_least("NUM_ID_DECODER_LAYERS", self.num_id_decoder_layers, 1)
        _check_at_least("REL_PE_LENGTH", self.rel_pe_length, 2)
        _check_multiple("FEATURE_DIM + ID_DIM", self.embed_dim, self.head_dim, "HEAD_DIM")
        if self.feature_dim != self.hidden_dim:
            raise MotipError(
                "the ID decoder reads the detector's outputs, so their widths must agree",
                where="FEATURE_DIM",
                found=self.feature_dim,
                expected=f"DETR_HIDDEN_DIM = {self.hidden_dim}",
            )

    @property
    def embed_dim(self) -> int:
        """Width E = FEATURE_DIM + ID_DIM of a token of the ID decoder."""
        return self.feature_dim + self.id_dim

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read the architecture keys of `config` (any object with upper-case attributes).

        Raises:
            MotipError: a key is missing or has an unsupported value.
        """
        for key, (supported, reason) in _FIXED_KEYS.items():
            found = _read(config, key)
            if found != supported:
                raise MotipError(
                    f"{key}: {found} is not supported ({reason})",
                    where=key,
                    found=found,
                    expected=supported,
                    fix=f"set {key}: {supported}",
                )
        values = {name: _read(config, key) for name, key in _CONFIG_KEYS.items()}
        values["train_backbone"] = _read(config, "LR") * _read(config, "backbone_lr_scale") > 0
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for a checkpoint read with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Inverse of ``to_dict``; a missing field keeps its default.

        Raises:
            MotipError: an unknown field.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise MotipError(
                "the stored architecture has fields unknown to this version",
                found=", ".join(unknown),
                fix="use the version of motip that wrote the file, or export the weights again",
            )
        return cls(**dict(values))


def _read(config: Any, key: str) -> Any:
    try:
        return getattr(config, key)
    except AttributeError:
        raise MotipError(
            f"the configuration has no {key}, which the architecture needs",
            where=key,
            fix="chain the base configuration with SUPER_CONFIG_PATH",
        ) from None


def _check_at_least(key: str, found: int, minimum: int) -> None:
    if found < minimum:
        raise MotipError("an architecture size is too small", where=key, found=found, expected=f"at least {minimum}")


def _check_choice(key: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        expected = " or ".join(str(choice) for choice in choices)
        raise MotipError(f"{key}: {found} is not supported", where=key, found=found, expected=expected)


def _check_multiple(key: str, found: int, factor: int, of_what: str) -> None:
    if found < factor or found % factor:
        raise MotipError(
            f"{key} must be a multiple of {factor} ({of_what})",
            where=key,
            found=found,
            expected=f"a multiple of {factor}",
        )
