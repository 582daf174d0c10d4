"""Transfer report: status of every tensor of a weights file and of the model it was transferred into."""

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
class TensorStatus:
    """Outcome of the transfer for one tensor.

    Attributes:
        category: one of CATEGORIES.
        shape: shape on its side, file or model.
        detail: explanation beyond the category, or "".
        alias_of: first key of the same tensor, or None.
    """

    category: str
    shape: tuple[int, ...]
    detail: str = ""
    alias_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        optional = {"detail": self.detail, "alias_of": self.alias_of}
        given = {name: value for name, value in optional.items() if value}
        return {"category": self.category, "shape": list(self.shape), **given}


@dataclass(frozen=True)
class TransferReport:
    """Status of every tensor of the file and of every tensor of the model.

    A model tensor is copied, rows moved by class name, grown or initialised; a file tensor is copied, rows moved,
    grown or dropped. A tensor with two names is listed under both, the second with ``alias_of``.
    """

    path: str
    sha256: str
    kind: str
    file_classes: tuple[str, ...]
    classes: tuple[str, ...]
    classes_origin: str
    class_moves: tuple[str, ...]
    dropped_classes: tuple[str, ...]
    file_status: Mapping[str, TensorStatus]
    model_status: Mapping[str, TensorStatus]
    notes: tuple[str, ...]
    """Notable facts, one sentence each; printed at the end of the table."""

    def counts(self) -> dict[str, dict[str, int]]:
        """``{"file": {category: tensors}, "model": {...}}``; each side sums to the number of its tensors."""
        counted = {
            side: Counter(status.category for status in statuses.values())
            for side, statuses in (("file", self.file_status), ("model", self.model_status))
        }
        return {side: {category: own[category] for category in CATEGORIES} for side, own in counted.items()}

    def names(self, category: str, side: str) -> list[str]:
        """Keys of one `side` (``file`` or ``model``) in `category`."""
        statuses = self.file_status if side == "file" else self.model_status
        return [key for key, status in statuses.items() if status.category == category]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values (the content of ``transfer.json``)."""
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
            "file": {key: status.to_dict() for key, status in self.file_status.items()},
            "model": {key: status.to_dict() for key, status in self.model_status.items()},
        }

    def summary_line(self) -> str:
        """Counts per category in one line."""
        counts = self.counts()
        parts = [f"{number} {category}" for category, number in counts["model"].items() if number]
        dropped = f"{counts['file'][DROPPED]} of {len(self.file_status)} file tensors dropped"
        shown = f"{len(self.model_status)} model tensors: {', '.join(parts)}"
        return f"{shown}; {dropped} ({self.kind}, sha256 {self.sha256[:12]})"

    def table(self) -> str:
        """The report as text: counts per category, class moves, tensors not copied, notes."""
        counts = self.counts()
        lines = [
            f"weights  {self.path}",
            f"         {self.kind}, sha256 {self.sha256[:12]}",
            "",
            f"{'':<26}{'file':>7}{'model':>7}",
        ]
        for category in CATEGORIES:
            file = "-" if category == INITIALISED else counts["file"][category]
            model = "-" if category == DROPPED else counts["model"][category]
            lines.append(f"{category:<26}{file:>7}{model:>7}")
        lines.append(f"{'total':<26}{len(self.file_status):>7}{len(self.model_status):>7}")
        aliases = sum(status.alias_of is not None for status in self.model_status.values())
        if aliases:
            lines.append(f"{aliases} of the model's names are aliases of a tensor counted above")
        # Classes, then tensors that were not copied.
        lines += ["", f"classes  ({self.classes_origin})", *(f"  {move}" for move in self.class_moves)]
        for title, category, statuses in (
            (GROWN, GROWN, self.model_status),
            (f"{INITIALISED} (model tensors not filled from the file)", INITIALISED, self.model_status),
            (f"{DROPPED} (file tensors not used by the model)", DROPPED, self.file_status),
        ):
            chosen = {key: status for key, status in statuses.items() if status.category == category}
            if chosen:
                lines += ["", title, *(f"  {line}" for line in _name_lines(chosen))]
        if self.notes:
            lines += ["", *(f"NOTE  {note}" for note in self.notes)]
        return "\n".join(lines)


def _name_lines(statuses: Mapping[str, TensorStatus]) -> Iterable[str]:
    """Names with shape and detail; more than 8 names of one module are summarised in one line."""
    by_detail: dict[tuple[str, str], list[str]] = {}
    for key, status in statuses.items():
        module = ".".join(key.split(".")[:2]) if key.startswith("detr.") else key.split(".")[0]
        by_detail.setdefault((module, status.detail), []).append(key)
    for (module, detail), keys in by_detail.items():
        note = f"  {detail}" if detail else ""
        if len(keys) > _NAMES_SHOWN:
            yield f"{module}.*  {len(keys)} tensors{note}"
        else:
            yield from (f"{key}  {list(statuses[key].shape)}{note}" for key in keys)
