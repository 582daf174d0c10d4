"""Generator of docs/configuration.md from the definitions of the configuration keys.

    python -m motip.config.reference > docs/configuration.md

Groups are the comments between the fields of :class:`motip.config.fields.Keys`, meanings the strings under the fields.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo

from motip.config.block import Block
from motip.config.curriculum_file import Curriculum, Domains, Mix, Source, Stage, Synthetic
from motip.config.fields import Keys, ValConfig
from motip.config.keys import Config
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


def configuration_page() -> str:
    """The complete page as Markdown."""
    # keys of a stage
    parts = [HEAD, "## A stage's keys\n"]
    parts += [_table(f"### {group}", rows.values()) for group, rows in _rows(Keys).items()]
    parts.append(_table("### The `val_config` block", _rows(ValConfig)[""].values()))

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
        rows = _rows(model)[""]
        if model is Source:
            del rows["name"]  # its key in `sources`, not a key of its block
        parts.append(_table(title, rows.values()))
    return "\n".join(parts)


def _rows(model: type[Block]) -> dict[str, dict[str, str]]:
    """Group to key to table row, in the order of the source; the comment above a field names its group."""
    groups: dict[str, dict[str, str]] = {}
    group = ""
    for line in inspect.getsource(model).splitlines():
        name = line.strip().partition(":")[0]
        if line.startswith("    # "):
            group = line.strip("# ")
        elif line.startswith(f"    {name}:") and name in model.model_fields:
            field = model.model_fields[name]
            cells = (f"`{name}`", _type_text(field), _default_text(field), " ".join((field.description or "").split()))
            escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            groups.setdefault(group, {})[name] = f"| {' | '.join(escaped)} |"
    return groups


def _table(title: str, rows: Iterable[str]) -> str:
    return "\n".join([f"{title}\n\n| key | type | default | meaning |\n|---|---|---|---|", *rows, ""])


def _type_text(field: FieldInfo) -> str:
    text = _annotation_text(field.annotation)
    limits = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
    bounds = [
        words.format(getattr(item, name))
        for item in field.metadata
        for name, words in limits.items()
        if hasattr(item, name)
    ]
    return ", ".join([text, *bounds])


def _annotation_text(annotation: Any) -> str:
    """A type as Markdown: `int`, `list[int]`, `a` or `b`, `int` or null, block."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_annotation_text, arguments))
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if (name := _type_name(annotation)) is not None:
        return f"`{name}`"
    if origin is tuple:
        return f"list of {_annotation_text(arguments[0])}"
    if origin is dict:
        return f"block of `{_type_name(arguments[0])}`: {_annotation_text(arguments[1])}"
    return {types.NoneType: "null", Config: "file name", SweepFile: "file name"}.get(annotation, "block")


def _type_name(annotation: Any) -> str | None:
    """`int`, `list[int]`, `dict[str, list[str]]`; None for choices and blocks."""
    if annotation in (int, float, str, bool):
        return str(annotation.__name__)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    inner = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
    if origin not in (tuple, dict) or None in inner:
        return None
    kind = "dict" if origin is dict else "list" if Ellipsis in arguments else ""
    return f"{kind}[{', '.join(map(str, inner))}]"


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if isinstance(field.default, Block) else f"`{_yaml_text(field.default)}`"


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
