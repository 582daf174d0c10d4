"""Overlay files: a sweep's tuned values as a YAML file with a report in comments, which a stage names in `tuned:`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motip.config.keys import Config
from motip.config.yaml_chain import parse_overrides, read_yaml, with_values
from motip.errors import MotipError


def overlay_text(values: Mapping[str, Any], report: Sequence[str]) -> str:
    """Content of the file: the report as comments, then a `KEY: value` line for each value, as JSON, which is YAML."""
    lines = [f"# {line}".rstrip() for line in report]
    lines += [f"{key}: {_yaml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def read_overlay(path: Path) -> dict[str, Any]:
    """The values of an overlay; empty if the sweep kept the baseline.

    Raises:
        MotipError: the file does not exist or is not YAML.
    """
    if not path.is_file():
        raise MotipError(
            "the file of tuned values does not exist",
            where=path,
            expected="a file written by a sweep",
            fix="run ray_jobs/tune.py for this stage, or remove the line `tuned:` from the curriculum file",
        )
    return read_yaml(path).values


def with_overlay(config: Config, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration with an overlay's values, and --set values, which override the overlay's.

    Raises:
        MotipError: a key of the overlay is unknown or a value is invalid.
    """
    tuned = with_values(config, read_overlay(path), str(path))
    return with_values(tuned, parse_overrides(overrides), "--set")


def _yaml_value(value: Any) -> str:
    """YAML text of a value. YAML 1.1 parses 1e-05 as a string, 1.0e-05 as a number."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa if not e else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
