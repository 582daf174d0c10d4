"""HTML written by a program: text is always escaped, markup is a type of its own."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_UNSHOWN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u202a-\\u202e\\u2066-\\u2069]")
"""Characters that no HTML may hold, halves of surrogate pairs, and those that make text read backwards."""
VOID = {"img", "meta", "link", "br", "source"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Part = Markup | str | float | None | Iterable["Part"]


def markup(part: Part) -> Markup:
    """What HTML shows as ``part``: Markup as it is, a list one after the other, None as nothing, other text escaped."""
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
        attributes: an underscore at the end is left out (``class_``), others become hyphens; True is the bare name,
            None and False leave the attribute out.
    """
    texts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        texts.append(f" {key}" if value is True else f' {key}="{markup(str(value))}"')
    start = f"<{name}{''.join(texts)}>"
    return Markup(start if name in VOID else f"{start}{markup(children)}</{name}>")
