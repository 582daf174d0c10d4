"""Conversion report: counts per source and split with every label row accounted for, as terminal table and JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from motip.data.image_check import near_duplicates
from motip.data.manifest import WINDOW_FRAMES, Manifest, VideoEntry
from motip.data.sequence import ReadReport
from motip.errors import MotipError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from motip.config import Curriculum, Stage
    from motip.data.convert_sequence import SequenceResult

PLAIN_EVERY_S = 10.0
"""Seconds between progress lines when the output is not a terminal."""
_MAX_NAMES = 5
"""Names listed in a note; the others are only counted."""


@dataclass
class ConvertReport:
    """Outcome of a conversion.

    Attributes:
        manifest: the manifest as saved.
        splits: source -> split -> counts (see :func:`describe_split`).
        notes: warnings for the user: shortages, near-duplicates, categories without labels.
        written: shards written by this conversion; the others were up to date.
        overlays: path of the label overlay by source.
    """

    manifest: Manifest
    splits: dict[str, dict[str, dict[str, Any]]]
    notes: list[str] = field(default_factory=list)
    written: int = 0
    overlays: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "manifest_digest": self.manifest.digest(),
            "settings": self.manifest.settings,
            "sources": self.splits,
            "notes": self.notes,
            "videos": len(self.manifest.videos),
            "shards_written": self.written,
            "overlays": self.overlays,
        }

    def summary_line(self) -> str:
        """One line for a log: videos and frames, shards written, label rows dropped, notes."""
        videos = len(self.manifest.videos)
        frames = sum(entry.frames for entry in self.manifest.videos)
        dropped = sum(
            sum(counts["rows"]["dropped"].values()) for splits in self.splits.values() for counts in splits.values()
        )
        line = f"shards: {videos} videos, {frames} frames ({self.written} videos written, the others were up to date)"
        return f"{line}; {dropped} label rows dropped, {len(self.notes)} notes (shards/report.json)"


def build_report(
    curriculum: Curriculum,
    manifest: Manifest,
    results: SequenceOf[SequenceResult],
    found: Mapping[str, Mapping[str, int]],
    notes: list[str],
    overlays: dict[str, str],
) -> ConvertReport:
    """Merge the counts of the jobs.

    Args:
        found: source -> split -> number of sequences in the raw data; rows of unselected ones do not count as dropped.
    """
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    sequences = [result.sequence for result in results]
    for name, source in curriculum.sources.items():
        for split in sorted(found.get(name, {})):
            chosen = [each for each in sequences if (each.source, each.split) == (name, split)]
            rows = ReadReport()
            for sequence in chosen:
                rows.add(sequence.rows)
            rows.check(f"all label files of {name}/{split}")
            counts = _describe_split(manifest.of(name, split), source.classes, rows)
            counts["sequences_read"] = len(chosen)
            counts["sequences_not_selected"] = found[name][split] - len(chosen)
            splits.setdefault(name, {})[split] = counts
    written = sum(result.written for result in results)
    return ConvertReport(manifest, splits, notes, written, overlays)


def _describe_split(
    entries: SequenceOf[VideoEntry], classes: Mapping[str, SequenceOf[str]], rows: ReadReport
) -> dict[str, Any]:
    """Counts of one split of a source.

    Tracks are counted per video and category: a track cut into two videos, or with two categories, counts twice.
    """
    boxes, ignored, tracks = Counter[str](), Counter[str](), Counter[str]()
    for entry in entries:
        boxes.update(entry.boxes)
        ignored.update(entry.ignored)
        tracks.update(entry.tracks)
    frames = sum(entry.frames for entry in entries)
    trained = {
        name: {
            "boxes": sum(boxes[raw] - ignored[raw] for raw in raws),
            "tracks": sum(tracks[raw] for raw in raws),
        }
        for name, raws in classes.items()
    }
    # Keys of report.json.
    return {
        "sequences": len({entry.sequence for entry in entries}),
        "videos": len(entries),
        "frames": frames,
        "frames_without_objects": sum(entry.empty_frames for entry in entries),
        "shard_bytes": sum(entry.shard_bytes for entry in entries),
        "objects_per_frame_mean": round(sum(entry.objects for entry in entries) / frames, 2) if frames else 0.0,
        "objects_per_frame_max": max((entry.max_objects for entry in entries), default=0),
        f"ids_per_{WINDOW_FRAMES}_frames_max": max((entry.max_window_ids for entry in entries), default=0),
        "categories": {
            name: {"boxes": boxes[name], "marked_ignore": ignored[name], "tracks": tracks[name]}
            for name in sorted(boxes)
        },
        "classes": trained,
        "boxes_to_ignore": sum(boxes.values()) - sum(counts["boxes"] for counts in trained.values()),
        "bad_images": [f"{entry.video}/{bad}" for entry in entries for bad in entry.bad_images],
        "rows": rows.to_dict(),
    }


def check_classes(curriculum: Curriculum, manifest: Manifest) -> list[str]:
    """Notes on mapped categories without labels and on classes exempt by ``allow_unlabelled``.

    Raises:
        MotipError: a class that a stage trains has no label in the stage's own training videos. Training would
            suppress the class and undo what earlier stages learned of it.
    """
    notes = []
    for stage in curriculum.stages:
        notes += _check_stage_classes(curriculum, stage, manifest)
    boxes = {name: count_boxes(manifest.of(name, "train")) for name in curriculum.sources}
    for name in sorted({mix.source for stage in curriculum.stages for mix in stage.data}):
        mapped = {raw for raws in curriculum.sources[name].classes.values() for raw in raws}
        absent = sorted(raw for raw in mapped if not boxes[name][raw])
        if absent:
            notes.append(
                f"{name}: no training label has the category {', '.join(absent)}; found {_listed(boxes[name])}"
            )
    return notes


def _check_stage_classes(curriculum: Curriculum, stage: Stage, manifest: Manifest) -> list[str]:
    boxes: dict[str, Counter[str]] = {}
    for mix in stage.data:
        chosen = manifest.select(
            mix.source, "train", videos=mix.videos, frame_budget=mix.frame_budget, allow_fewer=True
        )
        boxes[mix.source] = boxes.get(mix.source, Counter()) + count_boxes(chosen)
    notes = []
    for class_name in stage.config.class_names:
        raws = {(name, raw) for name in boxes for raw in curriculum.sources[name].classes.get(class_name, ())}
        if any(boxes[name][raw] for name, raw in raws):
            continue
        found = "; ".join(f"{name}: {_listed(counts)}" for name, counts in sorted(boxes.items()))
        if class_name not in stage.allow_unlabelled:
            raise MotipError(
                f"the class {class_name!r} of stage {stage.name!r} has no label in any of its training videos",
                where="classes of " + ", ".join(sorted(boxes)),
                found=found,
                expected=" or ".join(sorted(f"{name}: {raw}" for name, raw in raws)) or "a category mapped to it",
                fix="spell the categories as in the labels, take other or more videos, or drop the class (CLASSES, "
                f"NUM_CLASSES); if this is intended, put `allow_unlabelled: [{class_name}]` in the stage of the "
                "curriculum file",
            )
        notes.append(f"stage {stage.name} trains {class_name} without any label of it, as allowed; found {found}")
    return notes


def count_boxes(entries: SequenceOf[VideoEntry]) -> Counter[str]:
    """Boxes by raw category, without those the format marks as ignored."""
    total: Counter[str] = Counter()
    for entry in entries:
        total.update({name: count - entry.ignored.get(name, 0) for name, count in entry.boxes.items()})
    return +total


def _listed(boxes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(boxes.items()) if count) or "no boxes"


def check_leakage(manifest: Manifest, sources: SequenceOf[str], *, strict: bool) -> list[str]:
    """Notes on training videos that are near-duplicates of val or test videos.

    Raises:
        MotipError: a byte-identical frame in both; with ``strict`` also for near-duplicate frames.
    """
    ours = [entry for entry in manifest.videos if entry.source in sources]
    training = [(_full_name(entry), entry.image_hashes) for entry in ours if entry.split == "train"]
    evaluation = [(_full_name(entry), entry.image_hashes) for entry in ours if entry.split != "train"]
    pairs = near_duplicates(training, evaluation)
    equal = [pair for pair in pairs if pair[2]]
    if equal or (pairs and strict):
        train_name, other, is_equal = (equal or pairs)[0]
        raise MotipError(
            f"{len(equal or pairs)} pairs of training and evaluation videos "
            + ("share a frame" if is_equal else "have frames that look the same (--strict)"),
            where="videos of shards/manifest.json",
            found=f"such as {train_name} and {other}",
            expected="disjoint splits: scores on training videos are meaningless",
            fix="remove one of them from its split",
        )
    if not pairs:
        return []
    shown = "; ".join(f"{ours} ~ {theirs}" for ours, theirs, _ in pairs[:_MAX_NAMES])
    return [
        f"{len(pairs)} pairs of training and evaluation videos have frames that look the same "
        f"(the same scene filmed twice, or a leak?): {shown}{' ...' if len(pairs) > _MAX_NAMES else ''}"
    ]


def _full_name(entry: VideoEntry) -> str:
    return f"{entry.source}/{entry.split}/{entry.video}"


class ConversionUi:
    """Progress bar of a conversion, then its table and notes; in a log file, progress lines instead of the bar.

    Args:
        console: output; None = the terminal, or a wide console if the output is a file.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        terminal = console or Console(markup=False, emoji=False)
        # In a job's log file, a table folded at 80 columns is unreadable.
        self.console = terminal if console or terminal.is_terminal else Console(width=160, markup=False, emoji=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._printed = 0.0

    def __enter__(self) -> ConversionUi:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Progress callback of a conversion; without a terminal, one line per phase and one every 10 s."""
        begins = phase not in self._tasks
        if begins:
            self._tasks[phase] = self._bar.add_task(phase, total=total)
        self._bar.update(self._tasks[phase], completed=done, total=total)
        if not self.console.is_terminal and (begins or time.monotonic() - self._printed >= PLAIN_EVERY_S):
            self._printed = time.monotonic()
            self.console.print(f"{phase}: {'' if begins else f'{done} of '}{total} sequences", highlight=False)

    def show(self, report: ConvertReport) -> None:
        self.console.print(_report_table(report.splits))
        for note in report.notes:
            self.console.print(f"note: {note}", highlight=False)
        for source, path in report.overlays.items():
            self.console.print(f"labels of {source}: {path}", highlight=False)
        self.console.print(report.summary_line(), highlight=False)


def _report_table(splits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """One row per source and split."""
    from rich.table import Table

    table = Table(title="Shards")
    table.add_column("data", no_wrap=True)
    for column in ("sequences", "videos", "frames"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("boxes (tracks) by class", "to ignore", "objects per frame", "label rows"):
        table.add_column(column)
    for source, by_split in splits.items():
        for split, counts in by_split.items():
            rows = counts["rows"]
            sequences = str(counts["sequences"])
            if counts.get("sequences_not_selected"):
                sequences += f" of {counts['sequences'] + counts['sequences_not_selected']}"
            table.add_row(
                f"{source}/{split}",
                sequences,
                str(counts["videos"]),
                str(counts["frames"]),
                "\n".join(f"{name} {c['boxes']} ({c['tracks']})" for name, c in counts["classes"].items()),
                str(counts["boxes_to_ignore"]),
                f"{counts['objects_per_frame_mean']}, at most {counts['objects_per_frame_max']}",
                "\n".join([f"{rows['raw']}, kept {rows['kept']}", *_lines(rows["dropped"], rows["repaired"])]),
            )
    return table


def _lines(dropped: Mapping[str, int], repaired: Mapping[str, int]) -> list[str]:
    lines = [f"dropped {count}: {reason}" for reason, count in sorted(dropped.items())]
    return lines + [f"noted {count}: {what}" for what, count in sorted(repaired.items())]


def inspect_shards(manifest: Manifest, classes: Mapping[str, Mapping[str, SequenceOf[str]]] | None = None) -> Table:
    """The table of a shard set, from its manifest.

    Args:
        classes: source -> class -> raw categories; sources without an entry are shown by raw category.
    """
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for source, split in sorted({(entry.source, entry.split) for entry in manifest.videos}):
        entries = manifest.of(source, split)
        rows = ReadReport()
        for sequence in manifest.sequences:
            if (sequence.source, sequence.split) == (source, split):
                rows.add(sequence.rows)
        raw = {name: (name,) for entry in entries for name in entry.boxes}
        splits.setdefault(source, {})[split] = _describe_split(entries, (classes or {}).get(source, raw), rows)
    return _report_table(splits)
