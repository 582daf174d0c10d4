"""Blocks of keys: the base of the configuration's models, and the errors of their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from motip.errors import MotipError, check_known

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Name of a folder and of an MLflow run."""


class Block(BaseModel):
    """A block of keys: frozen, unknown keys forbidden; the string below a key is its meaning (`description`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: object) -> Self:
        """The block with these values.

        Raises:
            MotipError: at ``where``, for the first value that is invalid.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise MotipError(describe(error), where=where) from None


def describe(error: ValidationError) -> str:
    """The first validation error, in one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']} (found {first.get('input')!r})"


def check_keys(raw: Any, known: Iterable[str], where: object) -> dict[str, Any]:
    """The keys of a block in YAML.

    Raises:
        MotipError: it is no block, or has an unknown key.
    """
    if not isinstance(raw, dict):
        raise MotipError("this must be a block of `key: value` lines", where=where, found=raw)
    check_known(sorted(map(str, raw)), sorted(known), "unknown key {name}", where=where)
    return dict(raw)
