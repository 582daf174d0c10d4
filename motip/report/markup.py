"""HTML builder: ``Markup`` is escaped HTML, any other text is escaped when it is inserted."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_UNSHOWN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u202a-\\u202e\\u2066-\\u2069]")
"""Control characters not allowed in HTML, lone surrogates, and bidirectional overrides."""
VOID = {"img", "meta", "link", "br", "source"}


class Markup(str):
    """Text that is already escaped HTML."""

    __slots__ = ()


Part = Markup | str | float | None | Iterable["Part"]


def markup(part: Part) -> Markup:
    """HTML of ``part``: Markup unchanged, items of an iterable concatenated, None as "", other text escaped."""
    if part is None:
        return Markup()
    if isinstance(part, Markup):
        return part
    if isinstance(part, str):
        return Markup(html.escape(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", part)))
    if isinstance(part, int | float):
        return Markup(html.escape(str(part)))
    return Markup("".join(markup(each) for each in part))


def tag(name: str, /, *children: Part, **attributes: str | float | bool | None) -> Markup:
    """``<name attributes>children</name>``.

    Args:
        attributes: a trailing underscore is removed (``class_``), others become hyphens; True writes the bare name,
            None and False omit the attribute.
    """
    texts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        texts.append(f" {key}" if value is True else f' {key}="{markup(str(value))}"')
    start = f"<{name}{''.join(texts)}>"
    return Markup(start if name in VOID else f"{start}{markup(children)}</{name}>")
