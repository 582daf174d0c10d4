"""What happened to every tensor when weights moved from a file into a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

COPIED = "copied"
ROWS_MOVED = "rows moved by class name"
GROWN = "grown"
INITIALISED = "initialised"
DROPPED = "dropped"
CATEGORIES = (COPIED, ROWS_MOVED, GROWN, INITIALISED, DROPPED)

_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one tensor.

    Attributes:
        category: one of CATEGORIES.
        shape: the tensor's own shape (in the file for the file's tensors, in the model for the model's).
        detail: what a reader should know beyond the category, may be empty.
        alias_of: key under which the same tensor is counted first, or None.
    """

    category: str
    shape: tuple[int, ...]
    detail: str = ""
    alias_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"category": self.category, "shape": list(self.shape)}
        if self.detail:
            plain["detail"] = self.detail
        if self.alias_of:
            plain["alias_of"] = self.alias_of
        return plain


@dataclass(frozen=True)
class TransferReport:
    """Two ledgers: every tensor of the file and every tensor of the model, each in exactly one category.

    A model tensor is copied, rows moved by class name, grown or initialised; a file tensor is copied, rows moved,
    grown or dropped. A tensor with two names stands under both, the second marked ``alias_of``.
    """

    path: str
    sha256: str
    kind: str
    file_classes: tuple[str, ...]
    classes: tuple[str, ...]
    classes_origin: str
    class_moves: tuple[str, ...]
    dropped_classes: tuple[str, ...]
    file_fates: Mapping[str, Fate]
    model_fates: Mapping[str, Fate]
    notes: tuple[str, ...]
    """What must not be overlooked, one sentence each; printed loudly."""

    def counts(self) -> dict[str, dict[str, int]]:
        """``{"file": {category: tensors}, "model": {...}}``; each side sums to the number of its tensors."""
        return {
            side: {category: counted.get(category, 0) for category in CATEGORIES}
            for side, counted in (("file", _count(self.file_fates)), ("model", _count(self.model_fates)))
        }

    def names(self, category: str, side: str) -> list[str]:
        """Keys of one `side` (``file`` or ``model``) in `category`."""
        fates = self.file_fates if side == "file" else self.model_fates
        return [key for key, fate in fates.items() if fate.category == category]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "kind": self.kind,
            "file_classes": list(self.file_classes),
            "classes": list(self.classes),
            "classes_origin": self.classes_origin,
            "class_moves": list(self.class_moves),
            "dropped_classes": list(self.dropped_classes),
            "counts": self.counts(),
            "notes": list(self.notes),
            "file": {key: fate.to_dict() for key, fate in self.file_fates.items()},
            "model": {key: fate.to_dict() for key, fate in self.model_fates.items()},
        }

    def summary_line(self) -> str:
        """One line: how many of the model's tensors came from where."""
        counted = _count(self.model_fates)
        dropped = _count(self.file_fates).get(DROPPED, 0)
        parts = [f"{counted[category]} {category}" for category in CATEGORIES if counted.get(category)]
        return (
            f"{len(self.model_fates)} model tensors: {', '.join(parts)}; "
            f"{dropped} of {len(self.file_fates)} file tensors dropped ({self.kind}, sha256 {self.sha256[:12]})"
        )

    def table(self) -> str:
        """The report as text, one line per category and group of names."""
        counts = self.counts()
        lines = [
            f"weights  {self.path}",
            f"         {self.kind}, sha256 {self.sha256[:12]}",
            "",
            f"{'':<26}{'file':>7}{'model':>7}",
        ]
        for category in CATEGORIES:
            lines.append(f"{category:<26}{_cell(counts, 'file', category)}{_cell(counts, 'model', category)}")
        lines.append(f"{'total':<26}{len(self.file_fates):>7}{len(self.model_fates):>7}")
        aliases = sum(fate.alias_of is not None for fate in self.model_fates.values())
        if aliases:
            lines.append(f"{aliases} of the model's names are second names of a tensor counted above")
        lines += ["", f"classes  ({self.classes_origin})", *(f"  {move}" for move in self.class_moves)]
        for title, category, fates in (
            (f"{GROWN}", GROWN, self.model_fates),
            (f"{INITIALISED} (model tensors the file does not fill)", INITIALISED, self.model_fates),
            (f"{DROPPED} (file tensors the model does not take)", DROPPED, self.file_fates),
        ):
            chosen = {key: fate for key, fate in fates.items() if fate.category == category}
            if chosen:
                lines += ["", title, *(f"  {line}" for line in _name_lines(chosen))]
        if self.notes:
            lines += ["", *(f"NOTE  {note}" for note in self.notes)]
        return "\n".join(lines)


def _count(fates: Mapping[str, Fate]) -> Counter[str]:
    return Counter(fate.category for fate in fates.values())


def _cell(counts: Mapping[str, Mapping[str, int]], side: str, category: str) -> str:
    impossible = (side == "file" and category == INITIALISED) or (side == "model" and category == DROPPED)
    return f"{'-' if impossible else counts[side][category]:>7}"


def _name_lines(fates: Mapping[str, Fate]) -> Iterable[str]:
    """Names with shape and detail; many names of one module become one line with their number."""
    by_detail: dict[tuple[str, str], list[str]] = {}
    for key, fate in fates.items():
        module = ".".join(key.split(".")[:2]) if key.startswith("detr.") else key.split(".")[0]
        by_detail.setdefault((module, fate.detail), []).append(key)
    for (module, detail), keys in by_detail.items():
        note = f"  {detail}" if detail else ""
        if len(keys) > _NAMES_SHOWN:
            yield f"{module}.*  {len(keys)} tensors{note}"
        else:
            yield from (f"{key}  {list(fates[key].shape)}{note}" for key in keys)
