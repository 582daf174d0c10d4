"""Raw folders to shards: reads, decides which videos, writes what is missing, and accounts for every label row.

The work is a list of jobs, one per source sequence, run through a ``map_fn``: serially, in processes
(:func:`process_map`) or as Ray tasks (:func:`ray_map`). A job writes each of its shards whole or not at all, and the
manifest is written last, so a conversion that was stopped goes on where it was and ends with the same manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motip.data.convert_report import ConvertReport, build_report, check_classes, check_leakage
from motip.data.convert_sequence import Inspection, Piece, SequenceJob, SequenceResult, convert_sequence, inspect
from motip.data.formats.common import RawSequence, files_with
from motip.data.formats.registry import reader
from motip.data.manifest import Manifest, VideoEntry, manifest_path
from motip.data.overlay import write_overlays
from motip.data.selection import (
    Segment,
    cut,
    fewer_than_asked,
    limit_for,
    overlapping,
    pick,
    rank,
    shortage_note,
)
from motip.data.shards import ROWS_PER_GROUP, SHARD_VERSION
from motip.errors import MotipError
from motip.storage.paths import Location, location, one_at_a_time, remove_leftovers, require_folder, write_json

MapFn = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""Applies a function to jobs and yields the results, in any order."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of it are done, and how many there are."""


@dataclass
class SourcePlan:
    """What is to be converted of one source."""

    name: str
    jobs: list[SequenceJob] = field(default_factory=list)
    locked: dict[str, list[str]] = field(default_factory=dict)
    # Source sequences by split, of the splits that this conversion handles.
    found: dict[str, int] = field(default_factory=dict)
    limit: int = 0
    notes: list[str] = field(default_factory=list)


def convert(
    curriculum: Any,
    data_root: Location | str,
    storage: Location | str,
    *,
    strict: bool = False,
    seed: int | None = None,
    allow_fewer: bool = False,
    map_fn: MapFn | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write the shards of exactly the videos that the stages of a curriculum need, and all their val and test.

    Args:
        curriculum: sources and stages (``motip.config.Curriculum``).
        data_root: folder or S3 address that the sources' roots are relative to.
        storage: folder or S3 address under which ``shards/`` is written.
        strict: broken images and look-alikes between train and val are errors, not counted and reported.
        seed: order in which videos are picked (default: that of the conversion before, else 0).
        allow_fewer: go on with what there is when a source has fewer videos than a stage asks for.
        map_fn: how jobs are run (default: one after the other).

    Raises:
        MotipError: missing or unreadable data, fewer videos than asked for, val sequences in train, classes without
            a label, another conversion that has changed the seed meanwhile; what was finished stays and is not done
            again.
    """
    map_fn = map_fn or (lambda function, jobs: map(function, jobs))
    progress = progress or (lambda _phase, _done, _total: None)
    # Workers have other working directories, so relative places are settled here.
    data_root, storage = _absolute(data_root), _absolute(storage)
    check_data_root(data_root)
    require_folder(storage / "shards")
    remove_leftovers(storage / "shards")
    previous = _there(storage)
    order = previous.seed if seed is None else seed
    plans = []
    for source in curriculum.sources.values():
        lister = _Lister(source, data_root, storage, previous, strict)
        plan = SourcePlan(source.name)
        evaluation = lister.evaluation_jobs(plan)
        training = lister.training_jobs(plan, _mixes(curriculum, source.name), order, allow_fewer, map_fn, progress)
        plan.jobs = evaluation + training
        plans.append(plan)
    _refuse_shared_names(plans)
    jobs = [job for plan in plans for job in plan.jobs]
    results = _run(map_fn, convert_sequence, jobs, "converting", progress)
    notes = [note for plan in plans for note in plan.notes]
    notes += _seed_notes(seed, previous)

    def merged(there: Manifest) -> Manifest:
        if seed is None:
            _refuse_other_seed(there, order)
        _refuse_other_locks(there, plans)
        return _manifest(plans, results, there, order)

    def check(manifest: Manifest) -> list[str]:
        found = check_leakage(manifest, [plan.name for plan in plans], strict=strict)
        found += check_classes(curriculum, manifest)
        _check_requests(curriculum, manifest, allow_fewer)
        return found

    manifest, found = _save(storage, merged, check)
    notes += found + _unused_shards(manifest, storage)
    overlays = write_overlays(manifest, curriculum, storage)
    report = build_report(curriculum, manifest, results, {plan.name: plan.found for plan in plans}, notes, overlays)
    write_json(storage / "shards" / "report.json", report.to_dict())
    return report


def _there(storage: Location) -> Manifest:
    return Manifest.load(storage) if manifest_path(storage).is_file() else Manifest(())


def _save(
    storage: Location, merged: Callable[[Manifest], Manifest], check: Callable[[Manifest], list[str]]
) -> tuple[Manifest, list[str]]:
    """Merge with what other conversions into this storage have saved by now, check and save; nothing of theirs is lost.

    Args:
        merged: gives our manifest beside the one that is there.
        check: raises where it may not be saved; its notes are returned.
    """
    with one_at_a_time(storage / "shards" / ".manifest.lock", "another conversion into this storage"):
        while True:
            there = _there(storage)
            manifest = merged(there)
            notes = check(manifest)
            # The checks take seconds, and an object store has no lock.
            if _there(storage) == there:
                manifest.save(storage)
                return manifest, notes


def _seed_notes(seed: int | None, previous: Manifest) -> list[str]:
    if seed is None or not previous.videos or seed == previous.seed:
        return []
    return [
        f"videos are picked in the order of seed {seed} from now on, in every stage; the conversion before had seed "
        f"{previous.seed}. Stages that get other videos by this are trained again"
    ]


def _refuse_other_seed(there: Manifest, seed: int) -> None:
    if there.videos and there.seed != seed:
        raise MotipError(
            "another conversion into this storage has changed the seed while this one ran",
            where="shards/manifest.json",
            found=f"seed {there.seed}",
            expected=f"seed {seed}, by which the videos were picked here",
            fix="run it again: it then picks by the new seed, and what is finished is not done again",
        )


def _refuse_other_locks(there: Manifest, plans: list[SourcePlan]) -> None:
    """The first conversion locks; where two ran side by side, that is the one that has saved first."""
    for plan in plans:
        for split, names in there.locked.get(plan.name, {}).items():
            if sorted(names) != sorted(plan.locked.get(split, names)):
                raise MotipError(
                    f"another conversion into this storage has locked other {split} sequences of {plan.name!r} by now",
                    where="shards/manifest.json",
                    found=f"{len(names)} locked there, {len(plan.locked[split])} here",
                    fix="run it again with the same data and curriculum, or use another --storage",
                )


def check_data_root(data_root: Location | str) -> None:
    """Raises MotipError where the data root is no folder."""
    if not location(data_root).is_dir():
        raise MotipError(
            "the data root is missing",
            where=location(data_root),
            expected="a folder that holds the raw datasets",
            fix="pass --data-root the folder that the sources' roots are relative to",
        )


def _absolute(place: Location | str) -> Location:
    found = location(place)
    return found.resolve() if isinstance(found, Path) else found


def _mixes(curriculum: Any, source: str) -> list[Any]:
    return [mix for stage in curriculum.stages for mix in stage.data if mix.source == source]


def _tolerant(mix: Any) -> bool:
    return bool(getattr(mix, "allow_fewer", False))


def _root(source: Any, data_root: Location) -> Location:
    return location(source.root) if "://" in source.root else data_root / source.root


class _Lister:
    """Turns one source into jobs."""

    def __init__(self, source: Any, data_root: Location, storage: Location, previous: Manifest, strict: bool) -> None:
        self.source = source
        self.root = _root(source, data_root)
        self.storage = storage
        self.strict = strict
        self.reader = reader(source.format)
        self.locked_before = previous.locked.get(source.name, {})
        self.known: dict[tuple[str, str], list[VideoEntry]] = {}
        for entry in previous.videos:
            if entry.source == source.name:
                self.known.setdefault((entry.split, entry.sequence), []).append(entry)
        if not self.root.is_dir():
            raise MotipError(
                f"the data of source {source.name!r} is missing",
                where=self.root,
                expected=f"a folder in the {source.format} layout",
                fix="correct --data-root or the source's root, or drop the source from the curriculum",
            )

    def raw_sequences(self, role: str) -> list[RawSequence]:
        raws = self.reader.list_sequences(self.root, self.source.splits[role])
        wanted = getattr(self.source, "sequences", {}).get(role)
        if wanted is None:
            return raws
        missing = sorted(set(wanted) - {raw.name for raw in raws})
        if missing:
            raise MotipError(
                f"{len(missing)} {role} sequences of source {self.source.name!r} are not there, such as {missing[0]}",
                where=self.root / self.source.splits[role],
                expected=f"the {len(wanted)} sequences that are listed for it",
                fix="correct the list (a sequence map, or `sequences:` of the source), or fetch what is missing",
            )
        return [raw for raw in raws if raw.name in wanted]

    def evaluation_jobs(self, plan: SourcePlan) -> list[SequenceJob]:
        """Whole sequences of every split but train; the first conversion locks which they are.

        Splits that only earlier conversions handled stay locked as they are.
        """
        jobs = []
        plan.locked = {role: list(names) for role, names in self.locked_before.items()}
        for role in sorted(set(self.source.splits) - {"train"}):
            by_name = {raw.name: raw for raw in self.raw_sequences(role)}
            names = self.locked_before.get(role, sorted(by_name))
            gone = sorted(set(names) - set(by_name))
            if gone:
                raise MotipError(
                    f"{len(gone)} locked {role} sequences of source {self.source.name!r} are gone, such as {gone[0]}",
                    where=self.root,
                    expected=f"the {len(names)} sequences that the first conversion locked",
                    fix="bring them back, or start over in another --storage: scores on other sequences do not compare",
                )
            new = sorted(set(by_name) - set(names))
            if new:
                plan.notes.append(f"{self.source.name}: {len(new)} new {role} sequences are not in the lock, left out")
            plan.locked[role] = sorted(names)
            plan.found[role] = len(by_name)
            jobs += [self.job(by_name[name], role, None) for name in plan.locked[role]]
        return jobs

    def training_jobs(
        self,
        plan: SourcePlan,
        mixes: list[Any],
        seed: int,
        allow_fewer: bool,
        map_fn: MapFn,
        progress: Progress,
    ) -> list[SequenceJob]:
        """Segments of the training sequences, as many as the most demanding stage asks for."""
        if not mixes:
            return []
        raws = {raw.name: raw for raw in self.raw_sequences("train")}
        plan.found["train"] = len(raws)
        leaked = {role: overlapping(raws, names) for role, names in plan.locked.items() if overlapping(raws, names)}
        if leaked:
            role, names = next(iter(leaked.items()))
            raise MotipError(
                f"{len(names)} {role} sequences of source {self.source.name!r} are also in train, such as {names[0]}",
                where=self.root,
                expected="no sequence on both sides: scores on trained videos mean nothing",
                fix="correct the source's root and splits, or remove the sequences from one side; a lock of an earlier "
                "conversion ends with its --storage",
            )
        ordered = sorted(raws, key=lambda name: rank(name, 0, seed))
        asked = max((mix.videos for mix in mixes if mix.videos), default=0)
        budget = max((mix.frame_budget for mix in mixes if mix.frame_budget), default=0)
        everything = any(mix.videos is None and mix.frame_budget is None for mix in mixes)
        lengths = self.lengths([raws[name] for name in ordered], asked, budget, everything, map_fn, progress)
        most = self.source.max_frames_per_video
        limit = limit_for(lengths, asked, most)
        if limit is None:
            # Mixes that take what there is do not force short segments on the others.
            firm = 0 if allow_fewer else max((mix.videos or 0 for mix in mixes if not _tolerant(mix)), default=0)
            limit = limit_for(lengths, firm, most)
            if limit is None:
                raise fewer_than_asked(self.source.name, firm, lengths, most, where=self.root)
            plan.notes.append(f"{self.source.name}: {asked} videos were asked for, there are fewer; all are taken")
        if limit < most:
            plan.notes.append(shortage_note(self.source.name, asked, lengths, most, limit))
        plan.limit = limit
        segments = [segment for name, length in lengths.items() for segment in cut(name, length, most, limit)]
        segments.sort(key=lambda segment: rank(segment.sequence, segment.index, seed))
        picked = _pick(segments, asked, budget, everything)
        return [
            self.job(raws[name], "train", [s for s in picked if s.sequence == name])
            for name in sorted({segment.sequence for segment in picked})
        ]

    def lengths(
        self,
        raws: list[RawSequence],
        asked: int,
        budget: int,
        everything: bool,
        map_fn: MapFn,
        progress: Progress,
    ) -> dict[str, int]:
        """Frames by sequence, in the order of picking; no more sequences are read than the request can need."""
        lengths: dict[str, int] = {}
        waiting = list(raws)
        while waiting:
            have = sum(length > 0 for length in lengths.values())
            first_frames = sum(min(length, self.source.max_frames_per_video) for length in lengths.values())
            if not everything and have >= asked and (not budget or first_frames > budget):
                break
            batch = len(waiting) if everything else max(asked - have, 16 if budget else 1)
            now, waiting = waiting[:batch], waiting[batch:]
            jobs = [self.job(raw, "train", []) for raw in now]
            read: list[Inspection] = _run(map_fn, inspect, jobs, f"reading labels of {self.source.name}", progress)
            by_name = {item.sequence: item.frames for item in read}
            lengths |= {raw.name: by_name[raw.name] for raw in now}
        return lengths

    def job(self, raw: RawSequence, role: str, segments: list[Segment] | None) -> SequenceJob:
        """``segments`` None: the whole sequence as one video."""
        return SequenceJob(
            source=self.source.name,
            format=self.source.format,
            raw=raw,
            split=role,
            fps=self.source.fps,
            pieces=None if segments is None else tuple(Piece(s.index, s.count, s.start, s.stop) for s in segments),
            storage=self.storage,
            strict=self.strict,
            known=tuple(self.known.get((role, raw.name), ())),
        )


def _pick(segments: SequenceOf[Segment], asked: int, budget: int, everything: bool) -> list[Segment]:
    if everything:
        return list(segments)
    frames = [segment.frames for segment in segments]
    by_count = pick(segments, frames, videos=asked, frame_budget=None)
    by_budget = pick(segments, frames, videos=None, frame_budget=budget) if budget else []
    # Both are beginnings of the same list, so the longer one holds the other.
    return max(by_count, by_budget, key=len)


def _refuse_shared_names(plans: list[SourcePlan]) -> None:
    """Two sources over the same files must not train on what the other evaluates."""
    for plan in plans:
        training = {(job.format, job.raw.name) for job in plan.jobs if job.split == "train"}
        for other in plans:
            shared = sorted(
                job.raw.name for job in other.jobs if job.split != "train" and (job.format, job.raw.name) in training
            )
            if shared:
                raise MotipError(
                    f"source {plan.name!r} trains on sequences that {other.name!r} evaluates, such as {shared[0]}",
                    where="sources of the curriculum",
                    found=f"{len(shared)} sequences in both",
                    fix="give the two sources disjoint sequences",
                )


def _run(map_fn: MapFn, function: Callable[[Any], Any], jobs: list[Any], phase: str, progress: Progress) -> list[Any]:
    results = []
    progress(phase, 0, len(jobs))
    for result in map_fn(function, jobs):
        results.append(result)
        progress(phase, len(results), len(jobs))
    return sorted(results, key=lambda result: (result.source, result.split, result.sequence))


def _manifest(plans: list[SourcePlan], results: list[SequenceResult], previous: Manifest, seed: int) -> Manifest:
    """What was converted now, beside what it did not handle of the same storage, as it was.

    That is other sources, other evaluation splits, and the training videos of a source that this curriculum only
    evaluates: they belong to another curriculum on the same storage.
    """
    ours = {plan.name: set(plan.found) for plan in plans}

    def stays(source: str, split: str) -> bool:
        return split not in ours.get(source, ())

    entries = [entry for result in results for entry in result.entries]
    entries += [entry for entry in previous.videos if stays(entry.source, entry.split)]
    sequences = [result.to_dict() for result in results]
    sequences += [item for item in previous.sequences if stays(item["source"], item["split"])]
    locked = previous.locked | {plan.name: previous.locked.get(plan.name, {}) | plan.locked for plan in plans}
    limits = {**previous.settings.get("limits", {}), **{plan.name: plan.limit for plan in plans if plan.limit}}
    return Manifest(
        tuple(sorted(entries, key=lambda entry: entry.identity)),
        locked,
        tuple(sorted(sequences, key=lambda item: (item["source"], item["split"], item["sequence"]))),
        {"seed": seed, "rows_per_group": ROWS_PER_GROUP, "shard_version": SHARD_VERSION, "limits": limits},
    )


def _unused_shards(manifest: Manifest, storage: Location) -> list[str]:
    """A note on shards that no video of the manifest is stored in any more: sequences that are cut otherwise now."""
    used = {entry.shard for entry in manifest.videos}
    unused = [
        f"{source}/{split}/{item.name}"
        for source, split in sorted({(entry.source, entry.split) for entry in manifest.videos})
        for item in files_with(storage / "shards" / source / split, ".parquet")
        if f"{source}/{split}/{item.name}" not in used
    ]
    if not unused:
        return []
    return [
        f"{len(unused)} shards are not used by this curriculum; where no other one on this storage needs them they may "
        f"be deleted, such as {unused[0]}"
    ]


def _check_requests(curriculum: Any, manifest: Manifest, allow_fewer: bool) -> None:
    """Every stage gets what it asks for, also after broken images have cost a video."""
    for stage in curriculum.stages:
        for mix in stage.data:
            tolerant = allow_fewer or _tolerant(mix)
            manifest.select(mix.source, "train", videos=mix.videos, frame_budget=mix.frame_budget, allow_fewer=tolerant)


def process_map(workers: int) -> MapFn:
    """Jobs in ``workers`` processes of this machine."""

    def run(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed

        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(function, job) for job in jobs]
            try:
                for done in as_completed(waiting):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return run


def ray_map(cpus_per_task: float = 1.0) -> MapFn:
    """Jobs as Ray tasks on the cluster this process is connected to, as many at a time as its CPUs take."""

    def run(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        import ray

        task = ray.remote(num_cpus=cpus_per_task)(function)
        # Tasks beyond what can run now only cost memory of the scheduler; twice that keeps every CPU busy.
        at_once = max(2, int(2 * ray.cluster_resources().get("CPU", 1) / cpus_per_task))
        waiting = list(jobs)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(task.remote(waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])

    return run
