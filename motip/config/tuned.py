"""What a sweep found, as a small file of configuration keys that a stage can name: written with its evidence, read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motip.config.keys import Config
from motip.config.yaml_chain import parse_overrides, read_yaml, with_values
from motip.errors import MotipError


def overlay_text(values: Mapping[str, Any], evidence: Sequence[str]) -> str:
    """The file: evidence as comments, then one `KEY: value` line each; JSON values are YAML."""
    lines = [f"# {line}".rstrip() for line in evidence]
    lines += [f"{key}: {_number(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def read_overlay(path: Path) -> dict[str, Any]:
    """The keys of an overlay; none where a sweep found nothing better than the hand-set values.

    Raises:
        MotipError: the file is not there or no YAML.
    """
    if not path.is_file():
        raise MotipError(
            "the tuned values are not there",
            where=path,
            expected="the file that a sweep has written",
            fix="run ray_jobs/tune.py for this stage, or take the line `tuned:` out of the curriculum file",
        )
    return read_yaml(path).values


def with_overlay(config: Config, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration with an overlay's values on top, and --set on top of those.

    Raises:
        MotipError: a key or value of the overlay does not fit.
    """
    tuned = with_values(config, read_overlay(path), str(path))
    return with_values(tuned, parse_overrides(overrides), "--set")


def _number(value: Any) -> str:
    """YAML 1.1 takes 1e-05 for a string; 1.0e-05 is a number."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa if not e else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
