"""Class names of class-head rows: aliases, matching of two heads, initialisation of new classes.

Rows are matched by *name*, not by position: a head for (pedestrian, car) that becomes (car, pedestrian, van) keeps the
weights of both. The 91-row COCO head is indexed by COCO *category id* (person is row 1), so bird is row 16, not 15.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from motip.errors import MotipError

COCO_ROWS = 91
UNUSED_ROW = ""
"""Name of an unused head row (row 0 and the ten unused ids of COCO)."""

_PRIOR = "prior"

# Dataset-specific name of a class -> canonical name.
_ALIASES = {
    "person": "pedestrian",
    "people": "pedestrian",
    "motor": "motorcycle",
    "motorbike": "motorcycle",
    "bike": "bicycle",
    "automobile": "car",
    "lorry": "truck",
}


@dataclass(frozen=True, slots=True)
class ClassMove:
    """Origin of one row of the new class head.

    Attributes:
        name: class of the new head.
        how: ``name`` (same name), ``alias`` (another name of the same class), ``relative`` (a class named in
            CLASS_INIT), ``row`` (a row number in CLASS_INIT) or ``prior``.
        row: row of the file's head, None for ``prior``.
        source: name of that row in the file, or the reason for the prior.
    """

    name: str
    how: str
    row: int | None
    source: str

    def describe(self) -> str:
        if self.row is None:
            return f"{self.name} <- prior ({self.source})"
        label = {"name": "", "alias": ", alias", "relative": ", relative", "row": ", by row number"}[self.how]
        return f"{self.name} <- row {self.row} ({self.source or 'unused row'}{label})"


@cache
def coco_row_names() -> tuple[str, ...]:
    """The 91 row names of a COCO class head, indexed by category id; unused ids are UNUSED_ROW."""
    # Imported late: torchvision takes as long to import as torch.
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(UNUSED_ROW if name in ("__background__", "N/A") else name for name in names)


def _normalise_name(name: str) -> str:
    """Lower case, with ``-``, ``_`` and runs of spaces as one space: ``Traffic_Light`` -> ``traffic light``."""
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def canonical_name(name: str) -> str:
    """Canonical name of a class: ``person`` and ``people`` -> ``pedestrian``."""
    plain = _normalise_name(name)
    return _ALIASES.get(plain, plain)


def check_class_list(names: Sequence[str], rows: int, where: object) -> tuple[str, ...]:
    """`names` as a tuple, checked to name the `rows` rows of a head.

    Raises:
        MotipError: not a list of names, a duplicate name, or the number of names differs from `rows`.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise MotipError("a class list must be a list of names", where=where, found=repr(names)[:200])
    if len(names) != rows:
        raise MotipError(
            f"the class list names {len(names)} classes, but the class head has {rows} rows",
            where=where,
            found=", ".join(names[:12]) + (" ..." if len(names) > 12 else ""),
            expected=f"{rows} names, one per row of class_embed",
            fix="correct the class list (CLASSES in the configuration, PRETRAIN_CLASSES for a file without names)",
        )
    plain = [_normalise_name(name) for name in names if name != UNUSED_ROW]
    twice = sorted({name for name in plain if plain.count(name) > 1})
    if twice:
        raise MotipError("a class is named twice", where=where, found=", ".join(twice), expected="each name once")
    return tuple(names)


def match_classes(
    file_classes: Sequence[str],
    classes: Sequence[str],
    class_init: Mapping[str, str] | None = None,
    *,
    coco: bool,
) -> tuple[ClassMove, ...]:
    """Origin of every row of the new head, in this order of precedence.

    ``row:N`` in `class_init`; the row of the same name; the row of an alias (person, pedestrian); another entry of
    `class_init`: a class of the file, another new class, ``coco:NAME`` (prior if the file has no COCO head) or
    ``prior``; the prior.

    Raises:
        MotipError: an unknown relative, a cycle of relatives, an alias that matches two rows.
    """
    inits = {_normalise_name(name): source for name, source in (class_init or {}).items()}
    resolver = _Resolver(tuple(file_classes), tuple(classes), inits, coco)
    return tuple(resolver.move(name) for name in classes)


@dataclass(frozen=True)
class _Resolver:
    file_classes: tuple[str, ...]
    classes: tuple[str, ...]
    inits: dict[str, str]
    coco: bool

    def move(self, name: str) -> ClassMove:
        init = self.inits.get(_normalise_name(name), _PRIOR)
        if init.startswith("row:"):
            return self._from_row(name, "row", self._row_number(init, name))
        row = self._find(name)
        if row is not None:
            same = _normalise_name(self.file_classes[row]) == _normalise_name(name)
            return self._from_row(name, "name" if same else "alias", row)
        return self._relative(name, init, path=(_normalise_name(name),))

    def _from_row(self, name: str, how: str, row: int) -> ClassMove:
        return ClassMove(name, how, row, self.file_classes[row])

    def _find(self, name: str) -> int | None:
        named = [row for row, own in enumerate(self.file_classes) if own != UNUSED_ROW]
        for row in named:
            if _normalise_name(self.file_classes[row]) == _normalise_name(name):
                return row
        rows = [row for row in named if canonical_name(self.file_classes[row]) == canonical_name(name)]
        if len(rows) > 1:
            raise MotipError(
                f"class '{name}' has two candidates in the file's class head",
                found=" and ".join(self.file_classes[row] for row in rows),
                fix=f"select one in CLASS_INIT, e.g. {{{name}: row:{rows[0]}}}",
            )
        return rows[0] if rows else None

    def _relative(self, name: str, init: str, path: tuple[str, ...]) -> ClassMove:
        if init == _PRIOR:
            return ClassMove(name, "prior", None, "no class of this name in the file")
        if init.startswith("coco:"):
            return self._coco_relative(name, init)
        row = self._row_number(init, name) if init.startswith("row:") else self._find(init)
        if row is not None:
            return self._from_row(name, "relative", row)
        following = _normalise_name(init)
        if following in path:
            raise MotipError("CLASS_INIT is cyclic", where="CLASS_INIT", found=" <- ".join((*path, following)))
        if following not in self.inits and following not in map(_normalise_name, self.classes):
            raise MotipError(
                f"CLASS_INIT starts '{name}' from '{init}', which is neither a class of the file nor a new class",
                where="CLASS_INIT",
                found=init,
                expected=", ".join(own for own in self.file_classes if own != UNUSED_ROW),
                fix=f"name a class of the file, or set {name}: prior",
            )
        return self._relative(name, self.inits.get(following, _PRIOR), (*path, following))

    def _coco_relative(self, name: str, init: str) -> ClassMove:
        coco_name = init.removeprefix("coco:")
        plain, rows = _normalise_name(coco_name), coco_row_names()
        if plain == UNUSED_ROW or plain not in rows:
            raise MotipError(
                f"CLASS_INIT starts '{name}' from '{init}', which is not a COCO class",
                where="CLASS_INIT",
                found=coco_name,
                expected="one of the 80 COCO names, such as person, car, truck",
            )
        if not self.coco:
            return ClassMove(name, "prior", None, f"{init} applies to COCO files only")
        return self._from_row(name, "relative", rows.index(plain))

    def _row_number(self, init: str, name: str) -> int:
        text = init.removeprefix("row:").strip()
        if not text.isdigit() or int(text) >= len(self.file_classes):
            raise MotipError(
                f"CLASS_INIT starts '{name}' from a row outside the file's class head",
                where="CLASS_INIT",
                found=init,
                expected=f"row:0 .. row:{len(self.file_classes) - 1}",
            )
        return int(text)
