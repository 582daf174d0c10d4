"""Writes docs/configuration.md from the key definitions, so that the page cannot lag behind them.

    python -m motip.config.reference > docs/configuration.md

Groups are the comments between the fields of :class:`motip.config.keys.Config`, meanings the lines under the fields.
Keys of the published code have no such line; what they mean stands here (from the MOTIP and Deformable DETR papers).
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

HEAD = """\
# Configuration

*Written by `python -m motip.config.reference > docs/configuration.md`; do not edit by hand.*

A stage is configured by a YAML file, a curriculum by another that names the stages' files. Files of the plan and of the
published code run unchanged. An unknown key is an error that names file, line and the nearest known key.

## Which value wins

1. `SUPER_CONFIG_PATH` names the file that this one changes. It is looked for beside this file, then in the folders
   above it, then in the working directory. A chain that runs in a circle is an error.
2. Nearer to the leaf wins: a file's own value before that of the file it names.
3. `--set KEY=VALUE` wins over every file; VALUE is YAML. `--set val_config.KEY=VALUE` reaches into the block. In a
   curriculum `--set STAGE:KEY=VALUE` reaches one stage.
4. `KEY:` without a value means "not set": the default applies, or null where the key may be null.
5. Two keys that say the same thing: the one nearest the leaf wins, both in one file is an error. The pairs are
   `LR_DROP` / `SCHEDULER_MILESTONES`, `LR_BACKBONE` / `LR_BACKBONE_SCALE`, `sampler_lengths` / `SAMPLE_LENGTHS`,
   `sample_interval_seconds` / `sample_intervals` / `SAMPLE_INTERVALS`, `OUTPUT_DIR` / `OUTPUTS_DIR`.

## The plan's short keys

The published code never read these; here they mean:

| key | means |
|---|---|
| `LR_DROP: n` | the learning rate is multiplied by `SCHEDULER_GAMMA` after n epochs (`SCHEDULER_MILESTONES: [n]`) |
| `LR_BACKBONE: x` | the backbone's rate itself, that is `LR_BACKBONE_SCALE = x / LR` |
| `sampler_lengths: [a, b]` | the length of a clip is drawn from this set; the clips of a batch share one length |
| `sample_intervals: [a, b]` | the distance between a clip's frames is drawn from this set, per clip |
| `root_path` | the data root, where `--data-root` is not given |
| `OUTPUT_DIR: null` | the stage's own folder under the storage |
| `MEMORY_EFFICIENT: True` | a clip that does not fit the memory is tried again with less memory and more time |

Clip lengths and intervals are in frames; `sample_interval_seconds` is converted with each dataset's frame rate. A
length or interval that does not fit behind a start frame is drawn again from those that do.
"""

MEANINGS: dict[str, str] = {
    "SEED": "Of fresh weights, clip order and augmentation.",
    "OUTPUT_DIR": "The plan's name for OUTPUTS_DIR.",
    "DATA_ROOT": "Folder under the data root in which DATASETS are looked for first (ray_jobs/train.py).",
    "DATASETS": "Data of a stage that is trained alone: BDD100K, VisDrone, DanceTrack. In a curriculum its file says.",
    "DATASET_SPLITS": "Training split of each of DATASETS, or one for all.",
    "DATASET_WEIGHTS": "How often clips of each of DATASETS are drawn, relative to the others; null = equally.",
    "SAMPLE_STEPS": "Epochs (0-based) from which the next entries of SAMPLE_LENGTHS and SAMPLE_INTERVALS apply.",
    "SAMPLE_LENGTHS": "Clip length in frames, one per entry of SAMPLE_STEPS.",
    "SAMPLE_INTERVALS": "Largest frame interval, one per entry of SAMPLE_STEPS; drawn uniformly from 1 to it.",
    "LENGTH_PER_ITERATION": "Divides the clips of an epoch by clip length / this; null = all clips.",
    "sampler_lengths": "Clip length in frames is drawn from this set; the plan's form of SAMPLE_LENGTHS.",
    "sample_intervals": "Frame interval is drawn from this set; the plan's form of SAMPLE_INTERVALS.",
    "AUG_RESIZE_SCALES": "Short side of the image in pixels is drawn from these.",
    "AUG_MAX_SIZE": "The long side never exceeds this many pixels.",
    "AUG_RANDOM_RESIZE": "Half of the clips are cropped; before the crop the short side is drawn from these; an empty "
    "list: no crops.",
    "AUG_RANDOM_CROP_MIN": "Smallest side of the crop in pixels.",
    "AUG_RANDOM_CROP_MAX": "Largest side of the crop in pixels.",
    "AUG_MAX_SHIFT_RATIO": "Clips made of one image: the window slides by at most this share of its sides.",
    "AUG_OVERFLOW_BBOX": "Boxes cut by a crop keep the part outside instead of being clipped.",
    "AUG_FLIP_PROB": "Chance that a clip is mirrored.",
    "AUG_BRIGHTNESS": "Range of the colour jitter; the factor is drawn from 1 - x to 1 + x, once per clip.",
    "AUG_CONTRAST": "As AUG_BRIGHTNESS.",
    "AUG_SATURATION": "As AUG_BRIGHTNESS.",
    "AUG_HUE": "Largest hue shift, in turns of the colour circle.",
    "AUG_NUM_GROUPS": "Independent random labellings of each clip that the ID decoder is trained on.",
    "AUG_TRAJECTORY_OCCLUSION_PROB": "Chance that parts of a trajectory are hidden from the ID decoder.",
    "AUG_TRAJECTORY_SWITCH_PROB": "Chance that trajectories swap detections in a frame of the history.",
    "ONLY_DETR": "Train the detector alone, without ID decoder.",
    "NUM_CLASSES": "Object classes; their names come from CLASSES or val_config.CLASS_NAME_TO_ID.",
    "NUM_ID_VOCABULARY": "ID labels, the most objects that can be told apart at a time. May grow between stages.",
    "FEATURE_DIM": "Width of a detection's feature; equals DETR_HIDDEN_DIM.",
    "FFN_DIM_RATIO": "Width of the ID decoder's feed-forward layers, in multiples of their input.",
    "ID_DIM": "Width of an ID label's embedding.",
    "HEAD_DIM": "Width of an attention head of the ID decoder.",
    "NUM_ID_DECODER_LAYERS": "Layers of the ID decoder.",
    "ID_LOSS_WEIGHT": "Factor of the ID loss beside the detection loss.",
    "REL_PE_LENGTH": "Frames the ID decoder can look back; clips may not be longer.",
    "USE_AUX_LOSS": "ID loss on every layer of the ID decoder instead of the last.",
    "USE_SHARED_AUX_HEAD": "With USE_AUX_LOSS: one output head for all layers.",
    "USE_FOCAL_LOSS": "ID labels by sigmoid focal loss instead of cross-entropy.",
    "DILATION": "Dilated last stage of ResNet-50.",
    "DETR_NUM_QUERIES": "Object queries, the most detections in a frame.",
    "DETR_NUM_FEATURE_LEVELS": "Feature maps the transformer attends to: 3 or 4.",
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
    "DETR_SET_COST_CLASS": "Weight of the class in the matching of queries to objects.",
    "DETR_SET_COST_BBOX": "Weight of the L1 box distance in the matching.",
    "DETR_SET_COST_GIOU": "Weight of the generalised IoU in the matching.",
    "DETR_CRITERION_BATCH_LEN": "Frames over which two logged errors are averaged; no effect on the losses.",
    "BATCH_SIZE": "Clips per training worker and batch.",
    "ACCUMULATE_STEPS": "Batches per optimiser step.",
    "EPOCHS": "Epochs of the stage.",
    "LR": "Learning rate of all that no group below claims.",
    "LR_BACKBONE": "Learning rate of the backbone itself; null = LR x LR_BACKBONE_SCALE. 0 freezes it.",
    "LR_BACKBONE_NAMES": "Parameters with one of these in their name are the backbone.",
    "LR_BACKBONE_SCALE": "The backbone's rate as a share of LR.",
    "LR_LINEAR_PROJ_NAMES": "Parameters with one of these in their name are sampling points.",
    "LR_LINEAR_PROJ_SCALE": "Their rate as a share of LR.",
    "LR_DICTIONARY_NAMES": "Parameters with one of these in their name are ID words.",
    "LR_DICTIONARY_SCALE": "Their rate as a share of LR.",
    "LR_WARMUP_EPOCHS": "Epochs in which the rates rise linearly from 0; drops do not apply meanwhile.",
    "LR_DROP": "The one milestone, the plan's form of SCHEDULER_MILESTONES.",
    "SCHEDULER_MILESTONES": "Epochs after which the rates are multiplied by SCHEDULER_GAMMA.",
    "SCHEDULER_GAMMA": "Factor at each milestone.",
    "WEIGHT_DECAY": "Of AdamW, on every parameter.",
    "MAX_CLIP_NORM": "Gradients are scaled down to this norm.",
    "SEPARATE_CLIP_NORM": "The detector's gradients and the others are clipped apart.",
    "DETR_NUM_TRAIN_FRAMES": "Frames of a clip whose detection gets a gradient; 0 freezes the detector.",
    "DETR_NUM_CHECKPOINT_FRAMES": "Images at a time through the detector, recomputed backward; 0 = all at once.",
    "USE_DECODER_CHECKPOINT": "Recompute the ID decoder's layers in the backward pass: less memory, more time.",
    "SAVE_CHECKPOINT_PER_EPOCH": "Epochs between checkpoints; epochs that are evaluated are always saved.",
    "LOG_EVERY_STEPS": "Steps between two records of losses and rates.",
    "DETR_PRETRAIN": "Weights to start from: a detector's or a whole MOTIP checkpoint. A curriculum fills it in.",
    "RESUME_OPTIMIZER": "Take the optimiser along, where DETR_PRETRAIN is a checkpoint of this very configuration.",
    "RESUME_SCHEDULER": "Take the position in the schedule along, under the same condition.",
    "INFERENCE_SHORT_SIDE": "Frames are resized to this short side for tracking ...",
    "INFERENCE_MAX_LONGER": "... unless the long side would exceed this.",
    "INFERENCE_DTYPE": "Arithmetic of the detector when tracking.",
    "ASSIGNMENT_PROTOCOL": "How ID scores become labels: one-to-one optimum, each object's best, or each label's best.",
    "DET_THRESH": "A query whose best class score exceeds this is a detection.",
    "NEWBORN_THRESH": "A detection without identity starts a track above this score.",
    "ID_THRESH": "An ID label is believed from this score on.",
    "AREA_THRESH": "A detection covers more square pixels of the original image than this.",
    "LONGTERM_SIMILARITY": "Cosine similarity from which a new track is taken for a lost one.",
    "EVALUATE_EVERY_EPOCHS": "Epochs between validations; the last epoch is always validated.",
    "val_config": "Block of the plan, see below.",
    "Curriculum.name": "Name of the MLflow experiment's parent run and of the folder under the storage.",
    "Curriculum.sources": "Name to raw dataset.",
    "Curriculum.stages": "Stages in order.",
    "Curriculum.domains": "What is scored after every stage to see what it forgot.",
    "Source.format": "Which reader reads it; DanceTrack and MOT17 are `motchallenge`.",
    "Source.domain": "What it shows.",
    "Source.classes": "Class name to the raw categories that count as it; all others are ignore regions. "
    "Default for bdd100k and visdrone: the plan's pedestrian and car.",
    "Source.fps": "Frame rate; null = what the format states or defaults to.",
    "Source.max_frames_per_video": "Longer training sequences are cut into segments of at most this many frames.",
    "Source.synthetic": "A drawn world instead of data on disk.",
    "Stage.name": "Name of the MLflow run and of the stage's folder.",
    "Stage.config": "YAML file of the stage's configuration, found as SUPER_CONFIG_PATH is.",
    "Stage.data": "What the training clips are drawn from.",
    "Mix.source": "Name of a source.",
    "Mix.videos": "This many training videos; give either this or frame_budget.",
    "Mix.frame_budget": "As many training videos as fit this many frames, at least one.",
    "Synthetic.domain": "Which of the worlds.",
    "Synthetic.seed": "The same seed draws the same world.",
    "Synthetic.sequences": "Sequences per split.",
}  # fmt: skip
"""Key to its meaning, where no line stands under the field. Keys of blocks carry the block's name."""


@dataclass(frozen=True)
class Key:
    """One row of a table."""

    name: str
    group: str
    type: str
    default: str
    meaning: str

    def row(self) -> str:
        cells = (f"`{self.name}`", self.type, self.default, self.meaning)
        return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def keys_of(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """The keys of a model in the order of its source.

    Raises:
        KeyError: a key has no meaning anywhere.
    """
    return [
        Key(name, group, _type_text(model.model_fields[name]), _default_text(model.model_fields[name]), meaning)
        for name, group, line in _annotated_fields(model)
        for meaning in [_meaning(prefix + name, name, line)]
    ]


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, "## A stage's keys\n"]
    keys = keys_of(Config)
    for group in dict.fromkeys(key.group for key in keys):
        parts.append(_table(f"### {group}", [key for key in keys if key.group == group]))
    parts.append(_table("### The `val_config` block", keys_of(ValConfig, "val_config.")))
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
        # A source's name is its key in the file, not a line of its block.
        rows = [key for key in keys_of(model, f"{model.__name__}.") if (model, key.name) != (Source, "name")]
        parts.append(_table(title, rows))
    return "\n".join(parts)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


def _meaning(full_name: str, name: str, line: str | None) -> str:
    without = f"No effect: {WITHOUT_EFFECT[name]}." if name in WITHOUT_EFFECT else None
    if full_name == "Source.name":
        return "The source's key in the file."
    return line or without or MEANINGS[full_name]


def unused_meanings() -> list[str]:
    """Entries of MEANINGS that no table shows: their key is gone, or carries a line of its own."""
    shown = set()
    for model in (Config, ValConfig, Curriculum, Source, Stage, Mix, Synthetic, Domains):
        prefix = {Config: "", ValConfig: "val_config."}.get(model, f"{model.__name__}.")
        shown |= {prefix + name for name, _, line in _annotated_fields(model) if line is None}
    return sorted(name for name in MEANINGS if name not in shown or name in WITHOUT_EFFECT)


def _table(title: str, keys: list[Key]) -> str:
    rows = "\n".join(key.row() for key in keys)
    return f"{title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _annotated_fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str | None]]:
    """(key, group, line under the field or None) for every field, read from the source."""
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


_PLAIN = {int: "whole number", float: "number", str: "text", bool: "True or False"}


def _annotation_text(annotation: Any) -> str:
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        inner = [_annotation_text(argument) for argument in arguments if argument is not type(None)]
        return " or ".join([*inner, *(["null"] if type(None) in arguments else [])])
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return f"list of {len(arguments)}: {_annotation_text(arguments[0])}"
        return f"list of {_annotation_text(arguments[0])}"
    if origin is dict:
        return f"block of {_annotation_text(arguments[0])}: {_annotation_text(arguments[1])}"
    if annotation is Config:
        return "file name"
    return "block"


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
    print(page(), end="")
