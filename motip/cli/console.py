"""Console output of the verbs: tables, notes and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """Console on standard output or standard error; 240 columns wide unless it is a terminal.

    Markup in brackets and emoji codes between colons are not interpreted: paths and error messages contain both.
    """
    from rich.console import Console

    screen = Console(soft_wrap=True, stderr=stderr, markup=False, emoji=False)
    if screen.is_terminal:
        return screen
    return Console(soft_wrap=True, width=240, stderr=stderr, markup=False, emoji=False)


def line(text: str, stderr: bool = False) -> None:
    console(stderr).print(text, highlight=False)


def note(text: str, stderr: bool = False) -> None:
    line(f"note: {text}", stderr)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table; columns of numbers, except the first, are right-aligned."""
    from rich.table import Table

    rows = [list(map(str, row)) for row in rows]
    drawn = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        numeric = index > 0 and all(_is_number(row[index]) for row in rows)
        drawn.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        drawn.add_row(*row)
    console().print(drawn)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print ``name  value`` lines; entries with the value None are omitted."""
    kept = [(name, value) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        line(f"{name.ljust(width)}  {value}")


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=1, sort_keys=True, default=str))


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,-+% ")
