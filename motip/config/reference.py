"""Generator of docs/configuration.md from the definitions of the configuration keys.

    python -m motip.config.reference > docs/configuration.md

Groups are the comments between the fields of :class:`motip.config.keys.Config`, meanings the strings under the fields.
Keys of the published code have no such string; their meanings are in MEANINGS (from the MOTIP and Deformable DETR
papers).
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from motip.config.curriculum_file import Curriculum, Domains, Mix, Source, Stage, Synthetic
from motip.config.keys import WITHOUT_EFFECT, Config, ValConfig
from motip.config.sweep_file import SweepFile

HEAD = """\
# Configuration

*Written by `python -m motip.config.reference > docs/configuration.md`; do not edit by hand.*

A stage is configured by a YAML file, a curriculum by another that names the stages' files. The files of the training
plan (`TRAIN.md`) and of the published code run unchanged. An unknown key is an error that names file, line and the
closest known key.

## Precedence

1. `SUPER_CONFIG_PATH` names the file that this one inherits from. The path is relative to this file, to a parent
   folder, or to the working directory, in this order. A cyclic chain is an error.
2. A file's own value overrides that of the file it inherits from.
3. `--set KEY=VALUE` overrides every file; VALUE is YAML. `--set val_config.KEY=VALUE` sets a key of the block. In a
   curriculum `--set STAGE:KEY=VALUE` applies to one stage.
4. `KEY:` without a value means "not set": the default applies, or null if the key may be null.
5. Of two keys for the same setting the one nearest the leaf takes precedence; both in one file are an error. The pairs
   are `LR_DROP` / `SCHEDULER_MILESTONES`, `LR_BACKBONE` / `LR_BACKBONE_SCALE`, `sampler_lengths` / `SAMPLE_LENGTHS`,
   `sample_interval_seconds` / `sample_intervals` / `SAMPLE_INTERVALS`, `OUTPUT_DIR` / `OUTPUTS_DIR`.

## Short keys of the training plan

The published code does not read these keys; here they mean:

| key | meaning |
|---|---|
| `LR_DROP: n` | the learning rate is multiplied by `SCHEDULER_GAMMA` after n epochs (`SCHEDULER_MILESTONES: [n]`) |
| `LR_BACKBONE: x` | the absolute learning rate of the backbone, that is `LR_BACKBONE_SCALE = x / LR` |
| `sampler_lengths: [a, b]` | the length of a clip is sampled from this set; the clips of a batch share one length |
| `sample_intervals: [a, b]` | the distance between a clip's frames is sampled from this set, per clip |
| `root_path` | the data root, if `--data-root` is not given |
| `OUTPUT_DIR: null` | the stage's folder under the storage |
| `MEMORY_EFFICIENT: True` | a clip that does not fit GPU memory is retried with less memory and more time |

Clip lengths and intervals are in frames; `sample_interval_seconds` is converted with each dataset's frame rate. A
length or interval that exceeds the frames after a start frame is sampled again from those that fit.
"""

MEANINGS: dict[str, str] = {
    "SEED": "Seed of fresh weights, clip order and augmentation.",
    "OUTPUT_DIR": "The training plan's name for OUTPUTS_DIR.",
    "DATA_ROOT": "Folder under the data root that is searched first for DATASETS (ray_jobs/train.py).",
    "DATASETS": "Data of a single stage: BDD100K, VisDrone, DanceTrack. A curriculum file names its own sources.",
    "DATASET_SPLITS": "Training split of each of DATASETS, or one for all.",
    "DATASET_WEIGHTS": "Clips per start frame of each of DATASETS, relative to the others; null = equal.",
    "SAMPLE_STEPS": "Epochs (0-based) from which the next entries of SAMPLE_LENGTHS and SAMPLE_INTERVALS apply.",
    "SAMPLE_LENGTHS": "Clip length in frames, one per entry of SAMPLE_STEPS.",
    "SAMPLE_INTERVALS": "Largest frame interval, one per entry of SAMPLE_STEPS; sampled uniformly from 1 to this.",
    "LENGTH_PER_ITERATION": "Divides the clips of an epoch by clip length / this; null = all clips.",
    "sampler_lengths": "Clip length in frames, sampled from this set; the training plan's form of SAMPLE_LENGTHS.",
    "sample_intervals": "Frame interval, sampled from this set; the training plan's form of SAMPLE_INTERVALS.",
    "AUG_RESIZE_SCALES": "Short side of the image in pixels, sampled from this set.",
    "AUG_MAX_SIZE": "Maximum long side of the image in pixels.",
    "AUG_RANDOM_RESIZE": "Half of the clips are cropped; short side before the crop in pixels, sampled from this set. "
    "An empty list: no crops.",
    "AUG_RANDOM_CROP_MIN": "Smallest side of the crop in pixels.",
    "AUG_RANDOM_CROP_MAX": "Largest side of the crop in pixels.",
    "AUG_MAX_SHIFT_RATIO": "Clips made of one image: maximum shift of the window as a fraction of its sides.",
    "AUG_OVERFLOW_BBOX": "Boxes that a crop cuts keep the part outside instead of being clipped.",
    "AUG_FLIP_PROB": "Probability that a clip is mirrored.",
    "AUG_BRIGHTNESS": "Range x of the colour jitter; the factor is sampled from [1 - x, 1 + x] once per clip.",
    "AUG_CONTRAST": "As AUG_BRIGHTNESS.",
    "AUG_SATURATION": "As AUG_BRIGHTNESS.",
    "AUG_HUE": "Largest hue shift, in turns of the colour circle.",
    "AUG_NUM_GROUPS": "Number of random assignments of ID labels per clip that the ID decoder is trained on.",
    "AUG_TRAJECTORY_OCCLUSION_PROB": "Probability that parts of a trajectory are hidden from the ID decoder.",
    "AUG_TRAJECTORY_SWITCH_PROB": "Probability that trajectories swap detections in a frame of the history.",
    "ONLY_DETR": "Train the detector alone, without ID decoder.",
    "NUM_CLASSES": "Object classes; their names come from CLASSES or val_config.CLASS_NAME_TO_ID.",
    "NUM_ID_VOCABULARY": "Number of ID labels, the maximum number of concurrent tracks. May grow between stages.",
    "FEATURE_DIM": "Width of a detection's feature; equals DETR_HIDDEN_DIM.",
    "FFN_DIM_RATIO": "Width of the ID decoder's feed-forward layers, in multiples of their input.",
    "ID_DIM": "Width of an ID label's embedding.",
    "HEAD_DIM": "Width of an attention head of the ID decoder.",
    "NUM_ID_DECODER_LAYERS": "Layers of the ID decoder.",
    "ID_LOSS_WEIGHT": "Weight of the ID loss, relative to the detection loss.",
    "REL_PE_LENGTH": "Length of the ID decoder's history in frames; the maximum clip length.",
    "USE_AUX_LOSS": "ID loss on every layer of the ID decoder instead of the last.",
    "USE_SHARED_AUX_HEAD": "With USE_AUX_LOSS: one output head for all layers.",
    "USE_FOCAL_LOSS": "ID loss: sigmoid focal loss instead of cross-entropy.",
    "DILATION": "Dilated last stage of ResNet-50.",
    "DETR_NUM_QUERIES": "Object queries, the maximum number of detections in a frame.",
    "DETR_NUM_FEATURE_LEVELS": "Number of feature maps that the transformer attends to: 3 or 4.",
    "DETR_AUX_LOSS": "Detection loss on every decoder layer.",
    "DETR_WITH_BOX_REFINE": "Boxes are refined from layer to layer; only True is supported.",
    "DETR_TWO_STAGE": "Only False is supported.",
    "DETR_HIDDEN_DIM": "Width of the transformer.",
    "DETR_MASKS": "Only False is supported.",
    "DETR_POSITION_EMBEDDING": "Position encoding of the feature maps.",
    "DETR_NUM_HEADS": "Attention heads of the detector.",
    "DETR_ENC_LAYERS": "Encoder layers of the detector.",
    "DETR_DEC_LAYERS": "Decoder layers of the detector.",
    "DETR_DIM_FEEDFORWARD": "Width of the detector's feed-forward layers.",
    "DETR_DROPOUT": "Dropout of the detector's transformer.",
    "DETR_DEC_N_POINTS": "Sampling points per head and level in the decoder.",
    "DETR_ENC_N_POINTS": "Sampling points per head and level in the encoder.",
    "DETR_CLS_LOSS_COEF": "Weight of the classification loss.",
    "DETR_BBOX_LOSS_COEF": "Weight of the L1 box loss.",
    "DETR_GIOU_LOSS_COEF": "Weight of the generalised-IoU loss.",
    "DETR_FOCAL_ALPHA": "Alpha of the focal classification loss.",
    "DETR_SET_COST_CLASS": "Weight of the class cost in the matching of queries to objects.",
    "DETR_SET_COST_BBOX": "Weight of the L1 box distance in the matching.",
    "DETR_SET_COST_GIOU": "Weight of the generalised IoU in the matching.",
    "DETR_CRITERION_BATCH_LEN": "Frames over which two logged errors are averaged; no effect on the losses.",
    "BATCH_SIZE": "Clips per training worker and batch.",
    "ACCUMULATE_STEPS": "Batches per optimiser step.",
    "EPOCHS": "Epochs of the stage.",
    "LR": "Learning rate of all parameters that are in none of the groups below.",
    "LR_BACKBONE": "Absolute learning rate of the backbone; null = LR x LR_BACKBONE_SCALE. 0 freezes it.",
    "LR_BACKBONE_NAMES": "Parameters with one of these in their name are the backbone.",
    "LR_BACKBONE_SCALE": "Learning rate of the backbone as a fraction of LR.",
    "LR_LINEAR_PROJ_NAMES": "Parameters with one of these in their name are the sampling-point group.",
    "LR_LINEAR_PROJ_SCALE": "Learning rate of this group as a fraction of LR.",
    "LR_DICTIONARY_NAMES": "Parameters with one of these in their name are the ID dictionary.",
    "LR_DICTIONARY_SCALE": "Learning rate of the ID dictionary as a fraction of LR.",
    "LR_WARMUP_EPOCHS": "Epochs of linear warm-up from 0; milestones do not apply during it.",
    "LR_DROP": "A single milestone; the training plan's form of SCHEDULER_MILESTONES.",
    "SCHEDULER_MILESTONES": "Epochs after which the learning rates are multiplied by SCHEDULER_GAMMA.",
    "SCHEDULER_GAMMA": "Factor at each milestone.",
    "WEIGHT_DECAY": "Weight decay of AdamW, on every parameter.",
    "MAX_CLIP_NORM": "Maximum gradient norm; larger gradients are scaled down.",
    "SEPARATE_CLIP_NORM": "Clip the detector's gradients and the other gradients separately.",
    "DETR_NUM_TRAIN_FRAMES": "Frames of a clip whose detection gets a gradient; 0 freezes the detector.",
    "DETR_NUM_CHECKPOINT_FRAMES": "Images per detector chunk, recomputed in the backward pass; 0 = all in one, no "
    "recomputation.",
    "USE_DECODER_CHECKPOINT": "Recompute the ID decoder's layers in the backward pass: less memory, more time.",
    "SAVE_CHECKPOINT_PER_EPOCH": "Epochs between checkpoints; validated epochs are always saved.",
    "LOG_EVERY_STEPS": "Steps between two records of losses and learning rates.",
    "DETR_PRETRAIN": "Weights to start from: a detector or a complete MOTIP checkpoint. A curriculum sets it.",
    "RESUME_OPTIMIZER": "Resume the optimiser state, if DETR_PRETRAIN is a checkpoint of the same configuration.",
    "RESUME_SCHEDULER": "Resume the position in the schedule, under the same condition.",
    "INFERENCE_SHORT_SIDE": "Short side of the frames in pixels for tracking ...",
    "INFERENCE_MAX_LONGER": "... unless the long side would exceed this.",
    "INFERENCE_DTYPE": "Floating-point type of the detector when tracking.",
    "ASSIGNMENT_PROTOCOL": "Assignment of ID labels by score: one-to-one optimum, best per object, or best per label.",
    "DET_THRESH": "Class score above which a query is a detection.",
    "NEWBORN_THRESH": "Class score above which a detection without an ID label starts a track.",
    "ID_THRESH": "Minimum score of an ID label.",
    "AREA_THRESH": "Area in square pixels of the original image above which a detection is kept.",
    "LONGTERM_SIMILARITY": "Minimum cosine similarity for matching a new track to a lost one.",
    "EVALUATE_EVERY_EPOCHS": "Epochs between validations; the last epoch is always validated.",
    "val_config": "Block with the validation data, see below.",
    "Curriculum.name": "Name of the curriculum's MLflow run and of the folder under the storage.",
    "Curriculum.sources": "Name to raw dataset.",
    "Curriculum.stages": "Stages in order.",
    "Curriculum.domains": "Scoring of the domains after every stage, to measure forgetting.",
    "Source.format": "Reader of the raw dataset; DanceTrack and MOT17 are `motchallenge`.",
    "Source.domain": "Domain of its sequences.",
    "Source.classes": "Class name to the raw categories that count as it; all others are ignore regions. "
    "Default for bdd100k and visdrone: pedestrian and car.",
    "Source.fps": "Frame rate; null = the format's or dataset's.",
    "Source.max_frames_per_video": "Longer training sequences are cut into segments of at most this many frames.",
    "Source.synthetic": "Generate a synthetic dataset instead of reading data from disk.",
    "Stage.name": "Name of the MLflow run and of the stage's folder.",
    "Stage.config": "YAML file of the stage's configuration; the path is resolved like SUPER_CONFIG_PATH.",
    "Stage.data": "Sources of the training clips.",
    "Mix.source": "Name of a source.",
    "Mix.videos": "Number of training videos; set either this or frame_budget.",
    "Mix.frame_budget": "As many training videos as fit this many frames, at least one.",
    "Synthetic.domain": "Type of the scenes.",
    "Synthetic.seed": "Seed of the scenes.",
    "Synthetic.sequences": "Sequences per split.",
}
"""Key to its meaning, for fields without a string below them. Keys of blocks have the block's name as a prefix."""


@dataclass(frozen=True)
class KeyRow:
    """One row of a table."""

    name: str
    group: str
    type: str
    default: str
    meaning: str

    def row(self) -> str:
        cells = (f"`{self.name}`", self.type, self.default, self.meaning)
        return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def keys_of(model: type[BaseModel], prefix: str = "") -> list[KeyRow]:
    """The keys of a model in the order of its source.

    Raises:
        KeyError: a key has no meaning.
    """
    return [
        KeyRow(name, group, _type_text(model.model_fields[name]), _default_text(model.model_fields[name]), meaning)
        for name, group, line in _annotated_fields(model)
        for meaning in [_meaning(prefix + name, name, line)]
    ]


def configuration_page() -> str:
    """The complete page as Markdown."""
    # keys of a stage
    parts = [HEAD, "## A stage's keys\n"]
    keys = keys_of(Config)
    for group in dict.fromkeys(key.group for key in keys):
        parts.append(_table(f"### {group}", [key for key in keys if key.group == group]))
    parts.append(_table("### The `val_config` block", keys_of(ValConfig, "val_config.")))

    # curriculum file
    parts.append(
        "## The curriculum file\n\nFour keys: `name`, `sources`, `stages` and `domains`. The shipped one is "
        "[configs/curriculum.yaml](../configs/curriculum.yaml). A stage after the first that gives neither `weights` "
        "nor `initialise` starts from the one before it.\n"
    )
    for title, model in (
        ("### The file", Curriculum),
        ("### A source", Source),
        ("### A stage", Stage),
        ("### An entry of a stage's `data`", Mix),
        ("### A source's `synthetic` block", Synthetic),
        ("### The `domains` block", Domains),
    ):
        # A source's name is its key in `sources`, not a key of its block.
        rows = [key for key in keys_of(model, f"{model.__name__}.") if (model, key.name) != (Source, "name")]
        parts.append(_table(title, rows))
    return "\n".join(parts)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


def _meaning(full_name: str, name: str, line: str | None) -> str:
    without = f"No effect: {WITHOUT_EFFECT[name]}." if name in WITHOUT_EFFECT else None
    if full_name == "Source.name":
        return "Key of the source in the file."
    return line or without or MEANINGS[full_name]


def unused_meanings() -> list[str]:
    """Entries of MEANINGS that no table uses: the key was removed, or has a string below its field."""
    used = set()
    for model in (Config, ValConfig, Curriculum, Source, Stage, Mix, Synthetic, Domains):
        prefix = {Config: "", ValConfig: "val_config."}.get(model, f"{model.__name__}.")
        used |= {prefix + name for name, _, line in _annotated_fields(model) if line is None}
    return sorted(name for name in MEANINGS if name not in used or name in WITHOUT_EFFECT)


def _table(title: str, keys: list[KeyRow]) -> str:
    rows = "\n".join(key.row() for key in keys)
    return f"{title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _annotated_fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str | None]]:
    """(key, group, string below the field or None) for every field, read from the source code."""
    lines, _ = inspect.getsourcelines(model)
    body = ast.parse("".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    for position, node in enumerate(body.body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if node.target.id not in model.model_fields:
            continue
        above = [line.strip() for line in lines[: node.lineno - 1]]
        group = next((line[2:] for line in reversed(above) if line.startswith("# ")), "")
        after = body.body[position + 1] if position + 1 < len(body.body) else None
        line = None
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            line = " ".join(str(after.value.value).replace("``", "`").split())
        yield node.target.id, group.replace(" (WITHOUT_EFFECT)", ""), line


def _type_text(field: FieldInfo) -> str:
    text = _annotation_text(field.annotation)
    limits = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
    bounds = [
        words.format(getattr(item, name))
        for item in field.metadata
        for name, words in limits.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([text, *bounds])


def _annotation_text(annotation: Any) -> str:
    """A type as Markdown: `int`, `list[int]`, `a` or `b`, `int` or null, block."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        inner = [_annotation_text(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*inner, *(["null"] if type(None) in arguments else [])])
    name = _type_name(annotation)
    if name is not None:
        return f"`{name}`"
    if origin is tuple:
        return f"list of {_annotation_text(arguments[0])}"
    if origin is dict:
        return f"block of `{_type_name(arguments[0])}`: {_annotation_text(arguments[1])}"
    return "file name" if annotation in (Config, SweepFile) else "block"


def _type_name(annotation: Any) -> str | None:
    """`int`, `list[int]`, `dict[str, list[str]]`; None for choices and blocks."""
    if annotation in (int, float, str, bool):
        return str(annotation.__name__)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    inner = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
    if origin not in (tuple, dict) or None in inner:
        return None
    if origin is dict:
        return f"dict[{inner[0]}, {inner[1]}]"
    return f"list[{inner[0]}]" if Ellipsis in arguments else f"[{', '.join(map(str, inner))}]"


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if isinstance(field.default, BaseModel) else f"`{_yaml_text(field.default)}`"


def _yaml_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_yaml_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa)}e{int(exponent)}"
    return str(value)


if __name__ == "__main__":
    print(configuration_page(), end="")
