"""Transfer of weights from a file into a model, with a status for every tensor.

``plan_transfer`` checks and decides without changing the model; ``apply_transfer`` then copies. A file that does not
fit leaves the model unchanged.

Allowed differences between file and model: the classes (rows move by name), the ID vocabulary and REL_PE_LENGTH (they
grow), and the identity half if the file contains a detector only. All other tensors must agree in name and shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.build import build_model
from motip.model.motip import MOTIP
from motip.model.spec import ModelSpec
from motip.weights.class_names import UNUSED_ROW, ClassMove, check_class_list, match_classes
from motip.weights.files import IDENTITY_PREFIXES, WeightFile, read_weights
from motip.weights.transfer_report import COPIED, DROPPED, GROWN, INITIALISED, ROWS_MOVED, TensorStatus, TransferReport
from motip.weights.vocabulary import resize_positions, resize_words

_PRIOR_BIAS = -math.log(99.0)
"""Bias of a class head with score 0.01 (RetinaNet, section 4.1)."""

WORDS_KEY = "id_decoder.word_to_embed.weight"
POSITIONS_KEY = "id_decoder.rel_pos_embeds"
_SKIPPED = "skipped by PRETRAIN_SKIP"
_CLASS_HEAD = re.compile(r"detr\.class_embed\.\d+\.(weight|bias)$")
_LABEL_HEAD = re.compile(r"id_decoder\.embed_to_word_layers\.\d+\.weight$")
_BATCH_COUNTER = ".num_batches_tracked"
_LAYER_COUNTS = "compare the layer counts and BACKBONE with the file's"

# Pattern of a tensor name -> configuration keys that determine its shape; the first match counts.
_SIZE_KEYS = (
    (r"query_embed", "DETR_NUM_QUERIES, DETR_HIDDEN_DIM"),
    (r"level_embed|input_proj", "DETR_NUM_FEATURE_LEVELS, DETR_HIDDEN_DIM, BACKBONE"),
    (r"backbone", "BACKBONE"),
    (
        r"sampling_offsets|attention_weights",
        "DETR_NUM_HEADS, DETR_ENC_N_POINTS, DETR_DEC_N_POINTS, DETR_NUM_FEATURE_LEVELS",
    ),
    (r"detr\.transformer.*linear", "DETR_DIM_FEEDFORWARD, DETR_HIDDEN_DIM"),
    (r"detr\.", "DETR_HIDDEN_DIM"),
    (r"rel_pos_embeds", "NUM_ID_DECODER_LAYERS, HEAD_DIM, ID_DIM"),
    (r"", "FEATURE_DIM, ID_DIM, FFN_DIM_RATIO"),
)


@dataclass(frozen=True)
class TransferPlan:
    """A checked transfer: ``values`` (first name of each model tensor -> new value) and its report."""

    spec: ModelSpec
    values: Mapping[str, Tensor]
    report: TransferReport


def plan_transfer(
    weight_file: WeightFile,
    spec: ModelSpec,
    class_names: Sequence[str],
    *,
    new_class_from: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
    skip: Collection[str] = (),
) -> TransferPlan:
    """Decide the status of every tensor of the file and of the model.

    Args:
        weight_file: from ``read_weights``.
        spec: architecture of the model to fill.
        class_names: its classes, one per row of its class head.
        new_class_from: initial rows of new classes (CLASS_INIT), see ``match_classes``.
        allow: ``fnmatch`` patterns of full keys that may be missing in the file, unknown to the model, of another
            shape, or shrink. For other keys each of these is an error.
        skip: ``fnmatch`` patterns of full keys that are not transferred; the model keeps its initialisation.

    Raises:
        MotipError: the classes of the file are unknown; the file does not fit (names the first invalid key).
    """
    check_class_list(class_names, spec.num_classes, "the model's classes")
    if weight_file.classes is None:
        raise MotipError(
            f"the file has a class head of {weight_file.class_rows} rows and does not name its classes",
            where=weight_file.path,
            expected=f"{weight_file.class_rows} class names",
            fix="set PRETRAIN_CLASSES (or --classes) to the names of its rows, in their order",
        )
    moves = match_classes(
        weight_file.classes, class_names, new_class_from, coco=weight_file.classes_origin == "COCO category ids"
    )
    planner = _Planner(weight_file, spec, moves, tuple(allow))
    planner.skip(tuple(skip))
    planner.fill_model()
    planner.drop_rest_of_file()
    planner.raise_problems()
    return TransferPlan(spec, planner.values, planner.report(tuple(class_names)))


@torch.no_grad()
def apply_transfer(model: nn.Module, plan: TransferPlan) -> TransferReport:
    """Copy the planned values into `model` in place, on any device.

    Raises:
        MotipError: the architecture of `model` differs from the plan; `model` is then unchanged.
    """
    state = model.state_dict()
    planned = plan.report.model_status
    for key in [*planned, *state]:
        found = tuple(state[key].shape) if key in state else None
        expected = planned[key].shape if key in planned else None
        if found != expected:
            raise MotipError(
                "the model does not have the architecture the transfer was planned for",
                where=key,
                found=found or "no such tensor in the model",
                expected=expected or "no such tensor",
            )
    for key, value in plan.values.items():
        state[key].copy_(value)
    return plan.report


def load_pretrained(
    model: MOTIP,
    path: Path | str,
    class_names: Sequence[str],
    *,
    file_classes: Sequence[str] | None = None,
    new_class_from: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
) -> TransferReport:
    """Fill `model` from a weights file: ``read_weights``, ``plan_transfer``, ``apply_transfer`` in one call.

    Args:
        model: any device; filled in place.
        path, file_classes: see ``read_weights``.
        class_names, new_class_from, allow: see ``plan_transfer``.

    Raises:
        MotipError: from any of the three functions; the model is then unchanged.
    """
    weight_file = read_weights(path, classes=file_classes)
    plan = plan_transfer(weight_file, model.spec, class_names, new_class_from=new_class_from, allow=allow)
    return apply_transfer(model, plan)


@dataclass
class _Planner:
    """Collects values, statuses, notes and problems of one transfer."""

    file: WeightFile
    spec: ModelSpec
    moves: tuple[ClassMove, ...]
    allow: tuple[str, ...]
    values: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(init=False)
    """Tensors of the file that are not skipped."""
    file_status: dict[str, TensorStatus] = field(default_factory=dict)
    model_status: dict[str, TensorStatus] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, problem, advice)"""
    used_patterns: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tensors = dict(self.file.tensors)

    def skip(self, patterns: tuple[str, ...]) -> None:
        for pattern in patterns:
            hits = [key for key in self.file.tensors if fnmatchcase(key, pattern)]
            for key in hits:
                self.tensors.pop(key, None)
                self._drop(key, _SKIPPED)
            self.notes.append(
                f"{len(hits)} tensors are {_SKIPPED}: {pattern}"
                if hits
                else f"PRETRAIN_SKIP has no effect: no tensor of the file matches {pattern}"
            )

    def fill_model(self) -> None:
        """Value and status of every model tensor, and status of the file tensors used."""
        slots, groups = _model_tensors(self.spec)
        words = self._resized_words(slots, groups)
        for names in groups:
            slot, sources = slots[names[0]], [name for name in names if name in self.tensors]
            if not sources:
                self._fill(names, slot, INITIALISED, self._why_missing(names))
                continue
            # As in load_state_dict, the last of several values of one tensor is used.
            moved = self._move(sources[-1], slot, words) if self._agree(sources) else None
            if moved is None:
                self._fill(names, slot, INITIALISED, "other shape in the file, allowed")
                for key in sources:
                    self._drop(key, "other shape in the model, allowed")
                continue
            value, category, detail = moved
            self.values[names[0]] = value.to(slot.dtype)
            self._fill(names, slot, category, detail, sources[-1])
            self._account_for_sources(sources, category, detail)

    def _fill(self, names: list[str], slot: Tensor, category: str, detail: str, source: str = "") -> None:
        """Status of a model tensor under all its names; `source` is the file tensor it is filled from."""
        for name in names:
            through = f"filled through its other name {source}" if source and name not in self.tensors else detail
            first = None if name == names[0] else names[0]
            self.model_status[name] = TensorStatus(category, tuple(slot.shape), through, first)

    def _drop(self, key: str, detail: str) -> None:
        self.file_status[key] = TensorStatus(DROPPED, tuple(self.file.tensors[key].shape), detail)

    def _agree(self, sources: list[str]) -> bool:
        """Whether all names of one model tensor have the same shape in the file, or differences are allowed."""
        shape = self.tensors[sources[-1]].shape
        other = [key for key in sources if self.tensors[key].shape != shape]
        if not other or self._allowed(*other):
            return True
        found = f"shape {tuple(self.tensors[other[0]].shape)}, but {tuple(shape)} as {sources[-1]}"
        self._problem(other[0], found, "these are two names of one tensor: the file is damaged")
        return False

    def _move(self, key: str, slot: Tensor, words: Mapping[str, Tensor]) -> tuple[Tensor, str, str] | None:
        """Value, category and detail of a model tensor from the file tensor `key`; None if it does not fit."""
        tensor = self.tensors[key]
        if not tensor.is_floating_point():
            if not self._allowed(key):
                kind = str(tensor.dtype).removeprefix("torch.")
                self._problem(key, f"{kind} numbers where the model has floating-point ones", "the file is damaged")
            return None
        # Class rows, unchanged shapes, resized vocabulary, resized positions.
        if _CLASS_HEAD.match(key) and tensor.shape[1:] == slot.shape[1:]:
            if self._classes_unchanged():
                return tensor, COPIED, ""
            return _move_rows(self.file, key, self.moves), ROWS_MOVED, ""
        if tensor.shape == slot.shape:
            return tensor, COPIED, ""
        if key in words:
            axis = 1 if key == WORDS_KEY else 0
            old, new = tensor.shape[axis] - 1, slot.shape[axis] - 1
            return words[key], GROWN, f"{old} -> {new} labels, newborn moved from {old} to {new}"
        if key == POSITIONS_KEY and tensor.shape[::2] == slot.shape[::2]:
            old, new = tensor.shape[1], slot.shape[1]
            if new > old or self._allowed(key):
                change = "the last row repeated" if new > old else "the oldest dropped"
                detail = f"{old} -> {new} time steps, {change}"
                self.notes.append(f"REL_PE_LENGTH {detail}")
                return resize_positions(tensor, new), GROWN, detail
            self._problem(key, f"REL_PE_LENGTH would shrink from {old} to {new}", f"set REL_PE_LENGTH: {old}")
            return None
        # Another shape.
        reported = _is_word_tensor(key) and any(_is_word_tensor(bad) for bad, _, _ in self.problems)
        if not reported and not self._allowed(key):
            shapes = f"shape {tuple(tensor.shape)} in the file, {tuple(slot.shape)} in the model"
            keys = next(keys for pattern, keys in _SIZE_KEYS if re.search(pattern, key))
            self._problem(key, shapes, f"compare {keys} with the run that wrote the file")
        return None

    def _resized_words(self, slots: Mapping[str, Tensor], groups: Sequence[list[str]]) -> dict[str, Tensor]:
        """Resized label embedding and label heads, if the ID vocabulary of the file has another size; else empty."""
        embedding = self.tensors.get(WORDS_KEY)
        if embedding is None or WORDS_KEY not in slots or embedding.ndim != 2:
            return {}
        old, new = embedding.shape[1] - 1, slots[WORDS_KEY].shape[1] - 1
        expected = (slots[WORDS_KEY].shape[0], old + 1)
        if old == new or tuple(embedding.shape) != expected:
            return {}
        # Label heads of the file.
        named = ([name for name in names if name in self.tensors] for names in groups if _LABEL_HEAD.match(names[0]))
        heads = {names[-1]: self.tensors[names[-1]] for names in named if names}
        for key, head in heads.items():
            if tuple(head.shape) != (expected[1], expected[0]):
                found = f"shape {tuple(head.shape)}, but {WORDS_KEY} is {tuple(embedding.shape)}"
                self._problem(key, found, "the file is damaged")
                return {}
        # Resize.
        if new < old and not self._allowed(WORDS_KEY):
            found = f"the ID vocabulary would shrink from {old} to {new} labels"
            self._problem(WORDS_KEY, found, f"set NUM_ID_VOCABULARY: {old} or more")
            return {}
        resized, resized_heads = resize_words(embedding.float(), [head.float() for head in heads.values()], new)
        what = f"the ID vocabulary {'grew' if new > old else 'SHRANK'} from {old} to {new} labels"
        self.notes.append(
            f"{what}: labels 0..{min(old, new) - 1} bit-exact, newborn moved from {old} to {new}"
            + (f", labels {old}..{new - 1} are new" if new > old else "")
        )
        return {WORDS_KEY: resized, **dict(zip(heads, resized_heads, strict=True))}

    def _why_missing(self, names: list[str]) -> str:
        """Why the file has no value of a model tensor; a problem unless skipped, allowed or of a detector-only file."""
        if any(name in self.file.tensors for name in names):
            return _SKIPPED
        if names[0].startswith(IDENTITY_PREFIXES) and not self.file.has_identity:
            return ""
        if not self._allowed(*names):
            self._problem(names[0], "the file does not contain it", _LAYER_COUNTS)
        return "missing in the file, allowed"

    def _account_for_sources(self, sources: list[str], category: str, detail: str) -> None:
        winner = self.tensors[sources[-1]]
        same = [key for key in sources if _equal(self.tensors[key], winner)]
        for key in sources:
            self._drop(key, f"the model shares this tensor; it uses {sources[-1]}")
        for key in same:
            first = None if key == same[0] else same[0]
            self.file_status[key] = TensorStatus(category, tuple(winner.shape), detail, first)
        if len(same) < len(sources):
            self.notes.append(
                f"{len(sources) - len(same)} of {len(sources)} names of one shared tensor have other values in the "
                f"file; the last, {sources[-1]}, wins"
            )

    def drop_rest_of_file(self) -> None:
        """Status of file tensors without a model tensor."""
        for key in self.tensors:
            if key in self.file_status or key in self.model_status:
                continue
            if key.endswith(_BATCH_COUNTER):
                self._drop(key, "batch-norm step counter; frozen batch norm has none")
                continue
            if not self._allowed(key):
                self._problem(key, "the model has no such tensor", _LAYER_COUNTS)
            self._drop(key, "unknown to the model, allowed")

    def raise_problems(self) -> None:
        if not self.problems:
            return
        (key, wrong, advice), *others = self.problems
        names = ", ".join(name for name, _, _ in others[:5]) + (" ..." if len(others) > 5 else "")
        raise MotipError(
            "the weights do not fit the model; nothing was loaded",
            where=f"{self.file.path}, key {key}" + (f" (and {len(others)} more: {names})" if others else ""),
            found=wrong,
            expected="every tensor of the file and of the model accounted for",
            fix=f"{advice}; if it is intended, allow it by name: PRETRAIN_ALLOW: ['{key}'] (or --allow '{key}')",
        )

    def report(self, class_names: tuple[str, ...]) -> TransferReport:
        used = {move.row for move in self.moves}
        rows = enumerate(self.file.classes or ())
        dropped = tuple(name for row, name in rows if row not in used and name != UNUSED_ROW)
        return TransferReport(
            path=str(self.file.path),
            sha256=self.file.sha256,
            kind=self.file.kind,
            file_classes=self.file.classes or (),
            classes=class_names,
            classes_origin=self.file.classes_origin,
            class_moves=tuple(move.describe() for move in self.moves),
            dropped_classes=dropped,
            file_status={key: self.file_status[key] for key in self.file.tensors},
            model_status=dict(self.model_status),
            notes=(*self.file.notes, *self._class_notes(dropped), *self.notes, *self._other_notes()),
        )

    def _class_notes(self, dropped: tuple[str, ...]) -> Iterator[str]:
        if self.file.classes_origin == "assumed from one row":
            yield "the file does not name its class: assumed to be 'pedestrian' (PRETRAIN_CLASSES overrides)"
        new = (move for move in self.moves if move.how == "prior")
        yield from (f"class '{move.name}' is new and starts from the prior ({move.source})" for move in new)
        if dropped:
            shown = ", ".join(dropped[:8]) + (f" and {len(dropped) - 8} more" if len(dropped) > 8 else "")
            yield f"{len(dropped)} classes of the file are not in the model, their rows are dropped: {shown}"

    def _other_notes(self) -> Iterator[str]:
        initialised = [key for key, status in self.model_status.items() if status.category == INITIALISED]
        identity = [key for key in initialised if key.startswith(IDENTITY_PREFIXES)]
        if identity and not self.file.has_identity:
            yield (
                f"DETECTOR ONLY: the file has no identity half; {len(identity)} tensors of trajectory_modeling and "
                "id_decoder start from their initialisation, association is learnt from scratch"
            )
        if _boxes_without_refinement(self.tensors):
            yield "all box heads of the file are equal: it was probably trained without box refinement"
        narrow = sum(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in self.tensors.values())
        if narrow:
            yield f"{narrow} tensors of the file are stored in 16 bits and were widened"
        unused = [pattern for pattern in self.allow if pattern not in self.used_patterns]
        if unused:
            yield f"allowed but not needed: {', '.join(unused)}"

    def _classes_unchanged(self) -> bool:
        straight = all(move.row == row and move.how in ("name", "alias") for row, move in enumerate(self.moves))
        return straight and len(self.moves) == self.file.class_rows

    def _allowed(self, *keys: str) -> bool:
        hits = {pattern for pattern in self.allow if any(fnmatchcase(key, pattern) for key in keys)}
        self.used_patterns |= hits
        return bool(hits)

    def _problem(self, key: str, wrong: str, advice: str) -> None:
        self.problems.append((key, wrong, advice))


def _model_tensors(spec: ModelSpec) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Key -> meta tensor of a model of `spec`; all names of each tensor."""
    with torch.device("meta"):
        state = build_model(spec).state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(id(tensor), []).append(key)
    return dict(state), list(groups.values())


def _move_rows(file: WeightFile, key: str, moves: Sequence[ClassMove]) -> Tensor:
    """Class-head weight (C,D) or bias (C,) with rows of the file selected by `moves`.

    A row from the prior is the mean of the named rows of the file, with a bias of at most -log 99 and at least one
    below the mean bias. Its logit is then below the best known class on every query, so that detections of the parent
    and their order do not change before training, while the new class starts from a general "object" direction.
    """
    old = file.tensors[key].float()
    named = [row for row, name in enumerate(file.classes or ()) if name != UNUSED_ROW]
    mean = old[named].mean(0)
    prior = mean if key.endswith("weight") else torch.minimum(mean - 1.0, torch.tensor(_PRIOR_BIAS))
    return torch.stack([prior if move.row is None else old[move.row] for move in moves])


def _is_word_tensor(key: str) -> bool:
    return key == WORDS_KEY or _LABEL_HEAD.match(key) is not None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def _boxes_without_refinement(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all decoder layers have equal box heads, the result of training without refinement."""
    heads = [tensor for key, tensor in tensors.items() if re.match(r"detr\.bbox_embed\.\d+\.layers\.0\.weight$", key)]
    return len(heads) > 1 and all(_equal(heads[0], head) for head in heads[1:])
