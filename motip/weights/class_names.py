"""Class names of class-head rows: aliases, matching of two heads, initialisation of new classes.

Rows are matched by *name*, not by position: a head for (pedestrian, car) that becomes (car, pedestrian, van) keeps the
weights of both. The 91-row COCO head is indexed by COCO *category id* (person is row 1), so bird is row 16, not 15.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motip.errors import MotipError

COCO_ROWS = 91

COCO_CATEGORY_IDS: dict[str, int] = {
    "person": 1, "bicycle": 2, "car": 3, "motorcycle": 4, "airplane": 5, "bus": 6, "train": 7, "truck": 8, "boat": 9,
    "traffic light": 10, "fire hydrant": 11, "stop sign": 13, "parking meter": 14, "bench": 15, "bird": 16, "cat": 17,
    "dog": 18, "horse": 19, "sheep": 20, "cow": 21, "elephant": 22, "bear": 23, "zebra": 24, "giraffe": 25,
    "backpack": 27, "umbrella": 28, "handbag": 31, "tie": 32, "suitcase": 33, "frisbee": 34, "skis": 35,
    "snowboard": 36, "sports ball": 37, "kite": 38, "baseball bat": 39, "baseball glove": 40, "skateboard": 41,
    "surfboard": 42, "tennis racket": 43, "bottle": 44, "wine glass": 46, "cup": 47, "fork": 48, "knife": 49,
    "spoon": 50, "bowl": 51, "banana": 52, "apple": 53, "sandwich": 54, "orange": 55, "broccoli": 56, "carrot": 57,
    "hot dog": 58, "pizza": 59, "donut": 60, "cake": 61, "chair": 62, "couch": 63, "potted plant": 64, "bed": 65,
    "dining table": 67, "toilet": 70, "tv": 72, "laptop": 73, "mouse": 74, "remote": 75, "keyboard": 76,
    "cell phone": 77, "microwave": 78, "oven": 79, "toaster": 80, "sink": 81, "refrigerator": 82, "book": 84,
    "clock": 85, "vase": 86, "scissors": 87, "teddy bear": 88, "hair drier": 89, "toothbrush": 90,
}  # fmt: skip
"""The 80 COCO classes with their category ids (1..90; ten ids were never used), from the COCO annotation files."""

UNUSED_ROW = ""
"""Name of an unused head row (row 0 and the ten unused ids of COCO)."""

PRIOR = "prior"

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


def coco_row_names() -> tuple[str, ...]:
    """The 91 row names of a COCO class head, indexed by category id; unused ids are UNUSED_ROW."""
    names = [UNUSED_ROW] * COCO_ROWS
    for name, row in COCO_CATEGORY_IDS.items():
        names[row] = name
    return tuple(names)


def normalise_name(name: str) -> str:
    """Lower case, with ``-``, ``_`` and runs of spaces as one space: ``Traffic_Light`` -> ``traffic light``."""
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def canonical_name(name: str) -> str:
    """Canonical name of a class: ``person`` and ``people`` -> ``pedestrian``."""
    plain = normalise_name(name)
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
    plain = [normalise_name(name) for name in names if name != UNUSED_ROW]
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
    inits = {normalise_name(name): source for name, source in (class_init or {}).items()}
    resolver = _Resolver(tuple(file_classes), tuple(classes), inits, coco)
    return tuple(resolver.move(name) for name in classes)


@dataclass(frozen=True)
class _Resolver:
    file_classes: tuple[str, ...]
    classes: tuple[str, ...]
    inits: dict[str, str]
    coco: bool

    def move(self, name: str) -> ClassMove:
        init = self.inits.get(normalise_name(name), PRIOR)
        if init.startswith("row:"):
            row = self._row_number(init, name)
            return ClassMove(name, "row", row, self.file_classes[row])
        row_by_name = self._find(name)
        if row_by_name is not None:
            source = self.file_classes[row_by_name]
            same = normalise_name(source) == normalise_name(name)
            return ClassMove(name, "name" if same else "alias", row_by_name, source)
        return self._relative(name, init, path=(normalise_name(name),))

    def _find(self, name: str) -> int | None:
        plain, canonical = normalise_name(name), canonical_name(name)
        named = [(row, own) for row, own in enumerate(self.file_classes) if own != UNUSED_ROW]
        for row, own in named:
            if normalise_name(own) == plain:
                return row
        rows = [row for row, own in named if canonical_name(own) == canonical]
        if len(rows) > 1:
            raise MotipError(
                f"class '{name}' has two candidates in the file's class head",
                found=" and ".join(self.file_classes[row] for row in rows),
                fix=f"select one in CLASS_INIT, e.g. {{{name}: row:{rows[0]}}}",
            )
        return rows[0] if rows else None

    def _relative(self, name: str, init: str, path: tuple[str, ...]) -> ClassMove:
        if init == PRIOR:
            return ClassMove(name, "prior", None, "no class of this name in the file")
        if init.startswith("coco:"):
            return self._coco_relative(name, init)
        row = self._row_number(init, name) if init.startswith("row:") else self._find(init)
        if row is not None:
            return ClassMove(name, "relative", row, self.file_classes[row])
        following = normalise_name(init)
        if following in path:
            raise MotipError("CLASS_INIT is cyclic", where="CLASS_INIT", found=" <- ".join((*path, following)))
        if following not in self.inits and following not in map(normalise_name, self.classes):
            raise MotipError(
                f"CLASS_INIT starts '{name}' from '{init}', which is neither a class of the file nor a new class",
                where="CLASS_INIT",
                found=init,
                expected=", ".join(own for own in self.file_classes if own != UNUSED_ROW),
                fix=f"name a class of the file, or set {name}: prior",
            )
        return self._relative(name, self.inits.get(following, PRIOR), (*path, following))

    def _coco_relative(self, name: str, init: str) -> ClassMove:
        coco_name = init.removeprefix("coco:")
        if normalise_name(coco_name) not in COCO_CATEGORY_IDS:
            raise MotipError(
                f"CLASS_INIT starts '{name}' from '{init}', which is not a COCO class",
                where="CLASS_INIT",
                found=coco_name,
                expected="one of the 80 COCO names, such as person, car, truck",
            )
        if not self.coco:
            return ClassMove(name, "prior", None, f"{init} applies to COCO files only")
        row = COCO_CATEGORY_IDS[normalise_name(coco_name)]
        return ClassMove(name, "relative", row, self.file_classes[row])

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
