"""Conversion of raw datasets to Parquet shards: selects videos, writes missing shards, accounts for every label row.

The work is a list of jobs, one per source sequence, run through a ``map_fn``: serially, in processes
(:func:`process_map`) or as Ray tasks (:func:`ray_map`). Jobs write shards atomically and the manifest is written
last, so an interrupted conversion resumes where it stopped and produces the same manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from motip.data.convert_report import ConvertReport, build_report, check_classes, check_leakage
from motip.data.convert_sequence import SequenceJob, SequenceResult, convert_sequence, count_frames
from motip.data.formats.common import RawSequence, files_with
from motip.data.formats.registry import reader
from motip.data.manifest import Manifest, VideoEntry, manifest_path
from motip.data.overlay import write_overlays
from motip.data.selection import (
    Segment,
    cut_segments,
    segment_limit_for,
    selection_key,
    shortage_note,
    take_first,
    too_few_videos,
)
from motip.data.shards import ROWS_PER_GROUP, SHARD_VERSION
from motip.errors import MotipError
from motip.storage.paths import (
    Location,
    absolute,
    create_folder,
    exclusive_lock,
    location,
    remove_stale_files,
    write_json,
)

if TYPE_CHECKING:
    from motip.config import Curriculum, Mix, Source

_MapFn = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""Applies a function to jobs and yields the results, in any order."""
Progress = Callable[[str, int, int], None]
"""Called with the name of the phase, the number of finished jobs and the number of all jobs."""
_RunJobs = Callable[[Callable[[Any], Any], list[SequenceJob], str], list[Any]]
"""Applies a function to the jobs of a phase and returns the results, in any order."""


def convert(
    curriculum: Curriculum,
    data_root: Location | str,
    storage: Location | str,
    *,
    strict: bool = False,
    seed: int | None = None,
    allow_fewer: bool = False,
    map_fn: _MapFn | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write shards of the training videos that a curriculum's stages need and of all its val and test sequences.

    Args:
        data_root: folder or S3 address that the sources' roots are relative to.
        storage: folder or S3 address under which ``shards/`` is written.
        strict: raise on broken images and on near-duplicates of train and val instead of reporting them.
        seed: seed of the selection order (default: that of the previous conversion, else 0).
        allow_fewer: continue with the available videos when a source has fewer than a stage requests.
        map_fn: how jobs are run (default: serially).
        progress: called when a phase starts and after each job.

    Raises:
        MotipError: missing or unreadable data, fewer videos than requested, val sequences in train, classes without
            a label, or a seed changed by a concurrent conversion. Finished shards are kept and reused.
    """
    map_fn = map_fn or map
    progress = progress or (lambda _phase, _done, _total: None)

    def run(function: Callable[[Any], Any], jobs: list[SequenceJob], phase: str) -> list[Any]:
        results = []
        progress(phase, 0, len(jobs))
        for result in map_fn(function, jobs):
            results.append(result)
            progress(phase, len(results), len(jobs))
        return results

    # Workers have other working directories, so relative paths are resolved here.
    data_root, storage = absolute(data_root), absolute(storage)
    check_data_root(data_root)
    create_folder(storage / "shards")
    remove_stale_files(storage / "shards")
    previous = _load_manifest(storage)
    order = previous.seed if seed is None else seed

    # Plan the jobs of every source.
    plans = [_SourcePlan(source, data_root, storage, previous, strict) for source in curriculum.sources.values()]
    for plan in plans:
        plan.add_evaluation_jobs()
        plan.add_training_jobs(_mixes(curriculum, plan.name), order, allow_fewer, run)
    _check_disjoint_sources(plans)

    # Run them.
    jobs = [job for plan in plans for job in plan.jobs]
    results: list[SequenceResult] = run(convert_sequence, jobs, "converting")
    results.sort(key=lambda result: result.sequence.identity)
    notes = [note for plan in plans for note in plan.notes]
    notes += _seed_notes(seed, previous)

    # Merge with the manifest that other conversions have stored, check and save.
    with exclusive_lock(storage / "shards" / ".manifest.lock", "another conversion into this storage"):
        while True:
            stored = _load_manifest(storage)
            if seed is None:
                _check_same_seed(stored, order)
            _check_same_locks(stored, plans)
            manifest = _build_manifest(plans, results, stored, order)
            found = check_leakage(manifest, [plan.name for plan in plans], strict=strict)
            found += check_classes(curriculum, manifest)
            _check_requests(curriculum, manifest, allow_fewer)
            # The checks take seconds and object stores have no lock, so look for a concurrent change before saving.
            if _load_manifest(storage) == stored:
                manifest.save(storage)
                break

    # Report.
    notes += found + _unused_shard_notes(manifest, storage)
    overlays = write_overlays(manifest, curriculum, storage)
    report = build_report(curriculum, manifest, results, {plan.name: plan.found for plan in plans}, notes, overlays)
    write_json(storage / "shards" / "report.json", report.to_dict())
    return report


def _load_manifest(storage: Location) -> Manifest:
    return Manifest.load(storage) if manifest_path(storage).is_file() else Manifest(())


def _seed_notes(seed: int | None, previous: Manifest) -> list[str]:
    if seed is None or not previous.videos or seed == previous.seed:
        return []
    return [
        f"videos are selected in the order of seed {seed} from now on, in every stage; the previous conversion had "
        f"seed {previous.seed}. Stages whose videos change are trained again"
    ]


def _check_same_seed(stored: Manifest, seed: int) -> None:
    if stored.videos and stored.seed != seed:
        raise MotipError(
            "a concurrent conversion into this storage changed the seed",
            where="shards/manifest.json",
            found=f"seed {stored.seed}",
            expected=f"seed {seed}, which selected the videos of this conversion",
            fix="run it again: it selects with the new seed and reuses finished shards",
        )


def _check_same_locks(stored: Manifest, plans: list[_SourcePlan]) -> None:
    """The first conversion locks; of two concurrent ones, that is the first to save."""
    for plan in plans:
        for split, names in stored.locked.get(plan.name, {}).items():
            if sorted(names) != sorted(plan.locked.get(split, names)):
                raise MotipError(
                    f"a concurrent conversion into this storage locked other {split} sequences of {plan.name!r}",
                    where="shards/manifest.json",
                    found=f"{len(names)} locked in the manifest, {len(plan.locked[split])} by this conversion",
                    fix="run it again with the same data and curriculum, or use another --storage",
                )


def check_data_root(data_root: Location | str) -> None:
    """Raise MotipError unless the data root is a folder."""
    if not location(data_root).is_dir():
        raise MotipError(
            "the data root is missing",
            where=location(data_root),
            expected="a folder that contains the raw datasets",
            fix="pass --data-root the folder that the sources' roots are relative to",
        )


def _mixes(curriculum: Curriculum, source: str) -> list[Mix]:
    return [mix for stage in curriculum.stages for mix in stage.data if mix.source == source]


class _SourcePlan:
    """Conversion plan of one source.

    Attributes:
        locked: split -> names of the sequences locked for evaluation.
        found: split -> number of source sequences, for the splits that this conversion handles.
        limit: maximum length of a training segment in frames, 0 without training videos.
    """

    def __init__(
        self, source: Source, data_root: Location, storage: Location, previous: Manifest, strict: bool
    ) -> None:
        self.source, self.name = source, source.name
        self.root = location(source.root) if "://" in source.root else data_root / source.root
        self.storage = storage
        self.strict = strict
        self.reader = reader(source.format)
        self.known: dict[tuple[str, str], list[VideoEntry]] = {}
        for entry in previous.videos:
            if entry.source == source.name:
                self.known.setdefault((entry.split, entry.sequence), []).append(entry)
        self.locked_before = previous.locked.get(source.name, {})
        self.locked = {role: list(names) for role, names in self.locked_before.items()}
        self.jobs: list[SequenceJob] = []
        self.found: dict[str, int] = {}
        self.limit = 0
        self.notes: list[str] = []
        if not self.root.is_dir():
            raise MotipError(
                f"the data of source {source.name!r} is missing",
                where=self.root,
                expected=f"a folder in the {source.format} layout",
                fix="correct --data-root or the source's root, or drop the source from the curriculum",
            )

    def raw_sequences(self, role: str) -> list[RawSequence]:
        """Sequences of a split (train, val, test), restricted to those the source lists for it."""
        raws = self.reader.list_sequences(self.root, self.source.splits[role])
        listed = self.source.sequences.get(role)
        if listed is None:
            return raws
        missing = sorted(set(listed) - {raw.name for raw in raws})
        if missing:
            raise MotipError(
                f"{len(missing)} {role} sequences of source {self.name!r} are missing, such as {missing[0]}",
                where=self.root / self.source.splits[role],
                expected=f"the {len(listed)} sequences that are listed for it",
                fix="correct the list (a sequence map, or `sequences:` of the source), or download the missing data",
            )
        return [raw for raw in raws if raw.name in listed]

    def add_evaluation_jobs(self) -> None:
        """Uncut sequences of every split except train; the first conversion locks their names.

        Locks of splits that only earlier conversions handled stay unchanged.
        """
        for role in sorted(set(self.source.splits) - {"train"}):
            # Every locked sequence must still exist.
            by_name = {raw.name: raw for raw in self.raw_sequences(role)}
            names = self.locked_before.get(role, sorted(by_name))
            gone = sorted(set(names) - set(by_name))
            if gone:
                raise MotipError(
                    f"{len(gone)} locked {role} sequences of source {self.name!r} are gone, such as {gone[0]}",
                    where=self.root,
                    expected=f"the {len(names)} sequences that the first conversion locked",
                    fix="restore them, or use a new --storage: scores on other sequences are not comparable",
                )
            # New ones are left out.
            new = sorted(set(by_name) - set(names))
            if new:
                self.notes.append(f"{self.name}: {len(new)} new {role} sequences are not locked, left out")
            self.locked[role] = sorted(names)
            self.found[role] = len(by_name)
            self.jobs += [self.job(by_name[name], role, None) for name in self.locked[role]]

    def add_training_jobs(self, mixes: list[Mix], seed: int, allow_fewer: bool, run: _RunJobs) -> None:
        """Segments of the training sequences, as many as the largest request of a stage."""
        if not mixes:
            return
        raws = {raw.name: raw for raw in self.raw_sequences("train")}
        self.found["train"] = len(raws)

        # No sequence may be in train and in an evaluation split.
        for role, locked in self.locked.items():
            names = sorted(set(raws) & set(locked))
            if not names:
                continue
            raise MotipError(
                f"{len(names)} {role} sequences of source {self.name!r} are also in train, such as {names[0]}",
                where=self.root,
                expected="disjoint splits: scores on training videos are meaningless",
                fix="correct the source's root and splits, or remove the sequences from one split; locks of an earlier "
                "conversion hold for its --storage only",
            )

        # Frames of as many sequences as the requests can need.
        ordered = sorted(raws, key=lambda name: selection_key(name, 0, seed))
        requested = max((mix.videos for mix in mixes if mix.videos), default=0)
        budget = max((mix.frame_budget for mix in mixes if mix.frame_budget), default=0)
        everything = any(mix.videos is None and mix.frame_budget is None for mix in mixes)
        lengths = self.lengths([raws[name] for name in ordered], requested, budget, everything, run)

        # The segment length that yields enough videos.
        most = self.source.max_frames_per_video
        limit = segment_limit_for(lengths, requested, most)
        if limit is None:
            # Mixes that accept fewer videos do not force short segments on the others.
            required = 0 if allow_fewer else max((mix.videos or 0 for mix in mixes if not mix.allow_fewer), default=0)
            limit = segment_limit_for(lengths, required, most)
            if limit is None:
                raise too_few_videos(self.name, required, lengths, most, where=self.root)
            self.notes.append(f"{self.name}: {requested} videos were requested, fewer are available; all are taken")
        if limit < most:
            self.notes.append(shortage_note(self.name, requested, lengths, most, limit))
        self.limit = limit

        # Select segments; one job per sequence.
        segments = [segment for name, length in lengths.items() for segment in cut_segments(name, length, most, limit)]
        segments.sort(key=lambda segment: selection_key(segment.sequence, segment.index, seed))
        selected = _select_segments(segments, requested, budget, everything)
        for name in sorted({segment.sequence for segment in selected}):
            self.jobs.append(self.job(raws[name], "train", [s for s in selected if s.sequence == name]))

    def lengths(
        self, raws: list[RawSequence], requested: int, budget: int, everything: bool, run: _RunJobs
    ) -> dict[str, int]:
        """Frames by sequence in selection order; reads no more sequences than the request can need."""
        lengths: dict[str, int] = {}
        remaining = list(raws)
        while remaining:
            have = sum(length > 0 for length in lengths.values())
            first_frames = sum(min(length, self.source.max_frames_per_video) for length in lengths.values())
            if not everything and have >= requested and (not budget or first_frames > budget):
                break
            batch = len(remaining) if everything else max(requested - have, 16 if budget else 1)
            now, remaining = remaining[:batch], remaining[batch:]
            jobs = [self.job(raw, "train", []) for raw in now]
            counted = dict(run(count_frames, jobs, f"reading labels of {self.name}"))
            lengths |= {raw.name: counted[raw.name] for raw in now}
        return lengths

    def job(self, raw: RawSequence, role: str, segments: list[Segment] | None) -> SequenceJob:
        """The job of one sequence; ``segments`` None converts it uncut, as one video."""
        return SequenceJob(
            source=self.name,
            format=self.source.format,
            raw=raw,
            split=role,
            fps=self.source.fps,
            segments=None if segments is None else tuple(segments),
            storage=self.storage,
            strict=self.strict,
            known=tuple(self.known.get((role, raw.name), ())),
        )


def _select_segments(segments: SequenceOf[Segment], requested: int, budget: int, everything: bool) -> list[Segment]:
    if everything:
        return list(segments)
    frames = [segment.frames for segment in segments]
    by_count = take_first(segments, frames, videos=requested, frame_budget=None)
    by_budget = take_first(segments, frames, videos=None, frame_budget=budget) if budget else []
    return max(by_count, by_budget, key=len)  # Both are prefixes of the same list.


def _check_disjoint_sources(plans: list[_SourcePlan]) -> None:
    """Raise MotipError if one source trains on sequences that another source evaluates."""
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


def _build_manifest(plans: list[_SourcePlan], results: list[SequenceResult], previous: Manifest, seed: int) -> Manifest:
    """The converted videos, merged with the parts of the stored manifest that this conversion did not handle.

    Those are other sources, other evaluation splits, and the training videos of a source that this curriculum only
    evaluates; they belong to another curriculum on the same storage.
    """
    ours = {plan.name: set(plan.found) for plan in plans}

    def stays(source: str, split: str) -> bool:
        return split not in ours.get(source, ())

    entries = [entry for result in results for entry in result.entries]
    entries += [entry for entry in previous.videos if stays(entry.source, entry.split)]
    sequences = [result.sequence for result in results]
    sequences += [item for item in previous.sequences if stays(item.source, item.split)]
    locked = previous.locked | {plan.name: previous.locked.get(plan.name, {}) | plan.locked for plan in plans}
    limits = {**previous.settings.get("limits", {}), **{plan.name: plan.limit for plan in plans if plan.limit}}
    return Manifest(
        tuple(sorted(entries, key=lambda entry: entry.identity)),
        locked,
        tuple(sorted(sequences, key=lambda item: item.identity)),
        {"seed": seed, "rows_per_group": ROWS_PER_GROUP, "shard_version": SHARD_VERSION, "limits": limits},
    )


def _unused_shard_notes(manifest: Manifest, storage: Location) -> list[str]:
    """A note on shards without a video in the manifest, from sequences that are now cut differently."""
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
        f"{len(unused)} shards are not used by this curriculum, such as {unused[0]}; they may be deleted unless "
        "another curriculum on this storage needs them"
    ]


def _check_requests(curriculum: Curriculum, manifest: Manifest, allow_fewer: bool) -> None:
    """Raise MotipError unless every stage gets the videos it requests, also after losses to broken images."""
    for stage in curriculum.stages:
        for mix in stage.data:
            manifest.select(
                mix.source,
                "train",
                videos=mix.videos,
                frame_budget=mix.frame_budget,
                allow_fewer=allow_fewer or mix.allow_fewer,
            )


def process_map(workers: int) -> _MapFn:
    """A ``map_fn`` that runs jobs in ``workers`` local processes."""

    def run(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed

        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(function, job) for job in jobs]
            try:
                for done in as_completed(futures):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return run


def ray_map() -> _MapFn:
    """A ``map_fn`` that runs jobs as Ray tasks on the connected cluster, one CPU each."""

    def run(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        import ray

        task = ray.remote(num_cpus=1)(function)
        # Twice the tasks that can run keep every CPU busy; more only cost scheduler memory.
        max_pending = max(2, int(2 * ray.cluster_resources().get("CPU", 1)))
        remaining = list(jobs)
        running: list[Any] = []
        while remaining or running:
            while remaining and len(running) < max_pending:
                running.append(task.remote(remaining.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])

    return run
