"""YAML loading: a file, its SUPER_CONFIG_PATH chain and --set overrides, merged into one validated Config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from motip.config.block import describe
from motip.config.fields import WITHOUT_EFFECT, ValConfig
from motip.config.keys import Config
from motip.errors import MotipError, did_you_mean

_EQUIVALENT_KEYS: tuple[tuple[str, str], ...] = (
    ("LR_DROP", "SCHEDULER_MILESTONES"),
    ("LR_BACKBONE", "LR_BACKBONE_SCALE"),
    ("sampler_lengths", "SAMPLE_LENGTHS"),
    ("sample_intervals", "SAMPLE_INTERVALS"),
    ("sample_interval_seconds", "sample_intervals"),
    ("sample_interval_seconds", "SAMPLE_INTERVALS"),
    ("OUTPUT_DIR", "OUTPUTS_DIR"),
)
"""Pairs of keys for the same setting: the one nearest the leaf of the chain takes precedence."""


@dataclass(frozen=True)
class YamlFile:
    """Top-level keys of one file with their values and 1-based line numbers."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]


def read_yaml(path: Path) -> YamlFile:
    """Parse one YAML mapping with the safe loader, and record the line of each top-level key.

    Raises:
        MotipError: the file does not exist, is not UTF-8, not YAML or not a mapping, or repeats a key.
    """
    # text
    if not path.is_file():
        raise MotipError(
            "configuration file not found", where=path, fix="check the path; shipped files are in configs/"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MotipError(
            "the file is not text",
            where=path,
            found=f"the byte 0x{error.object[error.start]:02x} at position {error.start}",
            expected="a YAML file in UTF-8",
            fix="pass a configuration, not weights or an archive; save it as UTF-8",
        ) from None

    # mapping
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise MotipError(f"not valid YAML: {getattr(error, 'problem', error)}", where=where) from None
    if node is None:
        return YamlFile(path, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise MotipError("a configuration file must have `KEY: value` lines", where=path, found=type(values).__name__)

    # lines
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in lines:
            raise MotipError(
                f"{key} is set twice in one file",
                where=f"{path}:{key_node.start_mark.line + 1}",
                found=f"first at line {lines[key]}",
                fix="keep one of them",
            )
        lines[key] = key_node.start_mark.line + 1
    return YamlFile(path, {str(key): value for key, value in values.items()}, lines)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a stage's YAML file and the files it inherits from.

    Args:
        path: the leaf file.
        overrides: `KEY=VALUE` strings, VALUE in YAML; `val_config.KEY=VALUE` sets a key of the block.

    Raises:
        MotipError: naming the file, line and key.
    """
    leaf = Path(path).expanduser()
    files = _chain(leaf)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        _merge(values, origins, file.values, file.path, file.lines)
    _merge(values, origins, parse_overrides(overrides), "--set")
    return _build(values, origins, leaf)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` strings; `BLOCK.KEY=VALUE` sets a key of a block.

    Raises:
        MotipError: a string without `=`, or a VALUE that is not YAML.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key.strip():
            raise MotipError("--set takes KEY=VALUE", where="--set", found=text, expected="e.g. --set LR=1.0e-4")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise MotipError("the value is not valid YAML", where=f"--set {key}", found=raw) from None
        block, dot, inner = key.strip().partition(".")
        if dot:
            values.setdefault(block, {})[inner] = value
        else:
            values[block] = value
    return values


def with_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A validated copy of a configuration with a layer of values that overrides all files.

    Args:
        where: source of the values, for errors and as their origin.

    Raises:
        MotipError: a key is unknown, or a value is invalid.
    """
    plain = {key: value for key, value in config.to_dict().items() if key != "_name"}
    origins = {key: config.origin(key) for key in Config.model_fields if config.origin(key) != "default"}
    _merge(plain, origins, values, where)
    return _build(plain, origins, Path(f"{config.name}.yaml"))


def without_effect_message(config: Config) -> str | None:
    """One line with the keys that were set and have no effect here, or None."""
    plain = config.to_dict()
    defaults = Config().to_dict()
    found = [key for key in WITHOUT_EFFECT if key in plain and plain[key] != defaults[key]]
    if (plain["val_config"] or {}).get("BENCHMARK"):
        found.append("BENCHMARK")
    if not found:
        return None
    return "accepted without effect: " + "; ".join(f"{key} ({WITHOUT_EFFECT[key]})" for key in found)


def _chain(leaf: Path) -> list[YamlFile]:
    """The files from the root of the chain to the leaf."""
    files: list[YamlFile] = []
    path: Path | None = leaf
    while path is not None:
        if any(path.resolve() == file.path.resolve() for file in files):
            names = " -> ".join(file.path.name for file in files)
            raise MotipError("SUPER_CONFIG_PATH is cyclic", where=path, found=f"{names} -> {path.name}")
        file = read_yaml(path)
        files.append(file)
        parent = file.values.pop("SUPER_CONFIG_PATH", None)
        path = None if parent is None else find_relative(str(parent), file.path, file.lines["SUPER_CONFIG_PATH"])
    return files[::-1]


def find_relative(named: str, file: Path, line: int | None = None) -> Path:
    """Resolve a path written in ``file``: relative to its folder, to a parent folder, or to the working directory.

    The training plan writes `./configs/x.yaml` inside configs/, relative to the repository root; searching the parent
    folders makes this work from any working directory, also in the copy of a submitted job.

    Raises:
        MotipError: no such file.
    """
    path = Path(named).expanduser()
    folders = [Path()] if path.is_absolute() else [*file.resolve().parents, Path.cwd()]
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise MotipError(
        "file not found",
        where=f"{file}:{line}" if line else file,
        found=named,
        expected=f"a file relative to {file.parent}, a parent folder, or {Path.cwd()}",
    )


def check_is_key(key: str, where: object, block: str = "") -> None:
    """Raise MotipError if there is no such configuration key; `block`: in this block, `val_config.`."""
    known = (ValConfig if block else Config).model_fields
    if key not in known:
        raise MotipError(
            f"unknown configuration key {block}{key}",
            where=where,
            fix=did_you_mean(key, known, block) or "see docs/configuration.md for the keys",
        )


def _merge(
    values: dict[str, Any],
    origins: dict[str, str],
    layer: Mapping[str, Any],
    where: object,
    lines: Mapping[str, int] | None = None,
) -> None:
    """Check a layer of values and merge it into `values`; a key of the layer unsets its equivalent keys."""
    # keys
    own = {key: f"{where}:{lines[key]}" if lines else str(where) for key in layer}
    for key in layer:
        check_is_key(key, own[key])
    block = layer.get("val_config") or {}
    if not isinstance(block, dict):
        raise MotipError("val_config must be a block of keys", where=where, found=block)
    for key in block:
        check_is_key(key, own["val_config"], "val_config.")

    # values
    for pair in _EQUIVALENT_KEYS:
        for key, equivalent in (pair, pair[::-1]):
            if layer.get(key) is not None and layer.get(equivalent) is not None:
                what = f"{' and '.join(pair)} are the same setting"
                raise MotipError(what, where=where, fix="keep one of them")
            if layer.get(key) is not None:
                values[equivalent] = None
    values |= {**layer, "val_config": {**(values.get("val_config") or {}), **block}}
    origins |= own


def _build(values: dict[str, Any], origins: dict[str, str], leaf: Path) -> Config:
    # A bare `KEY:` means "not set": the default applies, unless the key may be null.
    cleaned = {key: value for key, value in values.items() if value is not None or _may_be_none(key)}
    try:
        config = Config(**cleaned)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise MotipError(describe(error), where=origins.get(key, leaf)) from None
    except MotipError as error:
        key = str(error.where).split(".")[0]
        where = f"{error.where} ({origins.get(key, 'default')}, read for {leaf})"
        raise MotipError(error.what, where=where, found=error.found, expected=error.expected, fix=error.fix) from None
    return config.named(leaf.stem, origins)


def _may_be_none(key: str) -> bool:
    annotation = Config.model_fields[key].annotation
    return type(None) in getattr(annotation, "__args__", ())
