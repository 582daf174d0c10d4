"""Clips through Ray Data: the only file that knows it.

Every rank builds a dataset of its own rows of the clip plan inside its training worker, instead of splitting one
dataset over the ranks: which rank gets which clip is then decided by the plan alone. Ray's own split hands rows out
in the order in which they happen to arrive, drops those that do not divide evenly, and is fixed before the first
epoch, while every epoch has another plan. A dataset may hold the rows of several epochs, which saves starting the
decoding actors anew for each of them.

Encoded frames are read and decoded in the actors; two buffers per clip cross the object store (uint8 pixels, and the
ragged labels packed into one), no pickle, and the training worker reads them in place.
"""

from __future__ import annotations

import ctypes
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from motip.data.clip_loader import ClipLoader, ClipSample, collate
from motip.data.clips import ClipRef
from motip.data.id_labels import SLOT_FIELDS, ClipSlots
from motip.errors import MotipError, find_motip_error

if TYPE_CHECKING:
    import ray.data

    from motip.data.batch import ClipBatch

BLOCK_BYTES = 64 << 20
"""Clips that one actor task decodes, as bytes of pixels: more clips mean fewer blocks to hand to Ray (1 to 3 ms each,
before the first batch), fewer clips mean less that waits for its turn in the object store."""
MOST_ROWS_PER_BLOCK = 16
BYTES_AT_ONCE = 24 << 20
"""Pixels that an actor collects before it hands them over: each hand-over costs Ray some milliseconds of CPU."""
LEAST_SHARE = 0.1
"""CPUs below which a process is refused: ten processes per core only queue up."""
_ALIGNMENT = 64
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class DataResources:
    """Logical CPUs of one training worker and of each of its decoding actors, and how many actors it gets."""

    worker_cpus: float
    actor_cpus: float
    actors_per_worker: int


def data_resources(
    total_cpus: float,
    workers: int,
    actors_per_worker: int,
    worker_cpus: float | None = None,
    node_cpus: Sequence[float] = (),
) -> DataResources:
    """Divide a cluster's CPUs so that all training workers and all decoding actors can run at once.

    Ray waits without a word for CPUs that never become free, so what does not fit is refused here. On a small
    machine the shares are fractions; half a CPU (or an eighth of a very small machine) is left for short tasks.
    More actors than one per core only take memory and time to start, so there are never more.

    Args:
        total_cpus: logical CPUs of the cluster.
        workers: training workers.
        actors_per_worker: decoding actors wanted for each; 0 = the worker decodes itself.
        worker_cpus: CPUs that a worker must have; None = a fair share, 1 at most.
        node_cpus: of each node, so that a fair share leaves no node a rest that is too small for one more process;
            empty = all CPUs are of one node.

    Raises:
        MotipError: with the arithmetic, when less than a tenth of a CPU is left for a process.
    """
    actors_per_worker = min(actors_per_worker, max(1, int(total_cpus // workers)))
    headroom = min(0.5, total_cpus / 8)
    room = total_cpus - headroom
    if worker_cpus is None:
        processes = workers * (1 + actors_per_worker)
        worker_cpus = actor_cpus = min(_floor(room / processes), _whole_share(node_cpus or [total_cpus], processes))
    else:
        left = room - workers * worker_cpus
        actor_cpus = min(1.0, _floor(left / (workers * actors_per_worker))) if actors_per_worker else 1.0
        actor_cpus = -1.0 if left < 0 else actor_cpus
    if min(worker_cpus, actor_cpus) < LEAST_SHARE:
        raise MotipError(
            "the cluster has too few CPUs: training would wait for ever",
            found=f"{total_cpus:g} CPUs, of which {headroom:g} stay free for short tasks",
            expected=(
                f"{workers} workers x ({worker_cpus if worker_cpus > LEAST_SHARE else LEAST_SHARE:g} CPU + "
                f"{actors_per_worker} decoding actors x at least {LEAST_SHARE} CPU)"
            ),
            fix="lower NUM_WORKERS (decoding actors per training worker) or --workers, or add nodes",
        )
    return DataResources(worker_cpus, actor_cpus if actors_per_worker else 0.0, actors_per_worker)


def clip_dataset(
    rows: Sequence[ClipRef],
    loader: ClipLoader,
    *,
    actors: int,
    actor_cpus: float,
    object_store_bytes: int | None = None,
) -> ray.data.Dataset:
    """A dataset whose rows are the given clips, decoded by a pool of actors, in this order.

    Args:
        rows: this rank's clips (`motip.data.clips.rank_rows`), of one epoch or several in a row.
        actors, actor_cpus: size of the pool and logical CPUs of each actor (`data_resources`).
        object_store_bytes: most that this dataset keeps in the object store; None = what two rounds of the actors'
            blocks take.
    """
    import ray.data

    if not rows:
        raise ValueError("a rank without clips: pad the plan before it is shared")
    pixels = loader.clip_bytes(max(len(clip.positions) for clip in rows))
    per_block = int(np.clip(BLOCK_BYTES // pixels, 1, MOST_ROWS_PER_BLOCK))
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = BYTES_AT_ONCE  # what an actor yields leaves it as it is, at once
    limit = object_store_bytes or max(256 << 20, 4 * actors * per_block * pixels)
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=limit
    )
    blocks = [
        pa.table({"row": range(begin, end), "clip": [clip.to_json() for clip in rows[begin:end]]})
        for begin, end in ((b, min(b + per_block, len(rows))) for b in range(0, len(rows), per_block))
    ]
    with ray.data.DataContext.current(context):
        return ray.data.from_arrow(blocks).map_batches(
            _DecodeActor,
            fn_constructor_kwargs={"loader": loader},
            batch_size=None,  # a whole block; its clips are yielded a few at a time
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=actor_cpus,
        )


def iterate(
    dataset: ray.data.Dataset, rows: Sequence[ClipRef], batch_size: int, prefetch: int = 2
) -> Iterator[ClipBatch]:
    """The batches of one rank, exactly the plan's rows in the plan's order.

    Args:
        dataset: `clip_dataset` of the same ``rows``.
        prefetch: batches fetched ahead, and one of them made in another thread meanwhile; 0 does all of it when
            asked. Has no influence on what is delivered.

    Raises:
        MotipError: a clip cannot be loaded, or Ray delivered other rows than the plan's.
    """
    batches = _batches(dataset, rows, batch_size, prefetch)
    yield from _one_ahead(batches) if prefetch else batches


def _batches(dataset: ray.data.Dataset, rows: Sequence[ClipRef], batch_size: int, prefetch: int) -> Iterator[ClipBatch]:
    samples: list[ClipSample] = []
    delivered = 0
    try:
        tables: Any = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=max(0, prefetch) * batch_size
        )
        for row, pixels, labels in _clips(tables):
            if delivered >= len(rows) or row != delivered:
                raise _wrong_rows(f"row {row} in place {delivered}", rows)
            samples.append(unpack(pixels, labels))
            delivered += 1
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
    except Exception as error:
        problem = find_motip_error(error)
        if problem is None or problem is error:
            raise
        raise problem from error  # the user's frame is broken, not Ray
    if delivered != len(rows) or samples:
        raise _wrong_rows(f"{delivered} rows, {len(samples)} of them in no whole batch", rows)


def _one_ahead(batches: Iterator[ClipBatch]) -> Iterator[ClipBatch]:
    """Make the next batch in another thread: copying long clips, where they are padded, takes a tenth of a step."""
    ready: queue.Queue[ClipBatch | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: ClipBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, name="motip-batches", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:  # also where the caller takes no more: the thread must not wait for ever
        stopped.set()


def _clips(tables: Iterator[pa.Table]) -> Iterator[tuple[int, pa.Buffer, pa.Buffer]]:
    """Row number, pixels and labels of each clip, without a copy."""
    for table in tables:
        yield from zip(table["row"].to_pylist(), _values(table["pixels"]), _values(table["labels"]), strict=True)


def _values(column: pa.ChunkedArray) -> Iterator[pa.Buffer]:
    """Each value where it lies; a scalar of Arrow, ``column[i]``, would be a copy of it."""
    for chunk in column.chunks:
        _, ends, content = chunk.buffers()
        places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        for begin, end in pairwise(places.tolist()):
            yield content.slice(begin, end - begin)


def pack(sample: ClipSample) -> tuple[np.ndarray, np.ndarray]:
    """One clip as two flat byte arrays: its pixels as they lie in memory, and everything else.

    The latter are the length of the header, a JSON header, then the arrays, each on a 64-byte border.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in ("boxes_cxcywh", "classes", "ignore_cxcywh"):
        parts: list[np.ndarray] = getattr(sample, name)
        arrays[name] = np.concatenate(parts)
        arrays[f"{name}_counts"] = np.array([len(part) for part in parts], dtype=np.int64)
    if sample.slots is not None:
        arrays |= {name: getattr(sample.slots, name) for name in SLOT_FIELDS}

    entries, offset = [], 0
    for name, array in arrays.items():
        entries.append((name, array.dtype.str, array.shape, offset))
        offset += _aligned(array.nbytes)
    header = {
        "name": sample.name,
        "weight": sample.weight,
        "slots": sample.slots and (sample.slots.distractors, sample.slots.dropped),
        "pixels": sample.images.shape,
        "arrays": entries,
    }
    text = json.dumps(header).encode()
    begin = _aligned(8 + len(text))
    packed = np.zeros(begin + offset, dtype=np.uint8)
    packed[:8].view(np.int64)[0] = len(text)
    packed[8 : 8 + len(text)] = np.frombuffer(text, np.uint8)
    for (_, _, _, at), array in zip(entries, arrays.values(), strict=True):
        packed[begin + at : begin + at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.ascontiguousarray(sample.images).reshape(-1), packed


def unpack(pixels: Any, packed: Any) -> ClipSample:
    """Inverse of `pack`; the arrays are read-only views of the buffers."""
    raw = np.frombuffer(packed, np.uint8)
    length = int(raw[:8].view(np.int64)[0])
    header = json.loads(raw[8 : 8 + length].tobytes())
    begin = _aligned(8 + length)
    arrays: dict[str, np.ndarray] = {}
    for name, dtype, shape, at in header["arrays"]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = raw[begin + at : begin + at + size].view(dtype).reshape(shape)

    def ragged(name: str) -> list[np.ndarray]:
        return np.split(arrays[name], np.cumsum(arrays[f"{name}_counts"])[:-1])

    slots = None
    if header["slots"] is not None:
        distractors, dropped = header["slots"]
        labels: dict[str, Any] = {name: arrays[name] for name in SLOT_FIELDS}
        slots = ClipSlots(**labels, distractors=distractors, dropped=dropped)
    return ClipSample(
        images=np.frombuffer(pixels, np.uint8).reshape(header["pixels"]),
        boxes_cxcywh=ragged("boxes_cxcywh"),
        classes=ragged("classes"),
        ignore_cxcywh=ragged("ignore_cxcywh"),
        slots=slots,
        name=header["name"],
        weight=header["weight"],
    )


def keep_freed_memory() -> None:
    """Have malloc keep what was freed for the next frame instead of giving it back to the system.

    Frames and clips come and go thousands of times, and each time the system maps and clears their pages anew, which
    takes as long as decoding a JPEG. Only glibc can be told so; elsewhere nothing changes.
    """
    keep, threshold = 256 << 20, 32 << 20  # the largest threshold that glibc takes
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, keep)
    mallopt(_M_MMAP_THRESHOLD, threshold)


class _DecodeActor:
    """Lives in a process of its own; keeps shard footers open between clips."""

    def __init__(self, loader: ClipLoader) -> None:
        import cv2

        cv2.setNumThreads(1)  # the pool is the parallelism; more threads would take the training worker's cores
        keep_freed_memory()
        self.loader = loader

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        ready: list[tuple[int, np.ndarray, np.ndarray]] = []
        for row, clip in zip(block["row"].to_pylist(), block["clip"].to_pylist(), strict=True):
            ready.append((row, *pack(self.loader.load(ClipRef.from_json(clip)))))
            if sum(pixels.nbytes for _, pixels, _ in ready) >= BYTES_AT_ONCE:
                yield _table(ready)
                ready = []
        if ready:
            yield _table(ready)


def _table(clips: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> pa.Table:
    rows, pixels, labels = zip(*clips, strict=True)
    return pa.table({"row": pa.array(rows, pa.int64()), "pixels": _binary(pixels), "labels": _binary(labels)})


def _binary(arrays: Sequence[np.ndarray]) -> pa.ChunkedArray:
    """One value per array, each a chunk of its own over the array's memory."""
    chunks = []
    for array in arrays:
        ends = pa.array([0, array.nbytes], pa.int64()).buffers()[1]
        chunks.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(array)]))
    return pa.chunked_array(chunks)


def _wrong_rows(found: str, rows: Sequence[ClipRef]) -> MotipError:
    return MotipError(
        "Ray Data did not deliver the clip plan",
        found=found,
        expected=f"rows 0..{len(rows) - 1}, each once and in order",
        fix="report this with your Ray version; --set NUM_WORKERS=0 decodes without Ray Data",
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _whole_share(node_cpus: Sequence[float], processes: int) -> float:
    """The largest share of a CPU, in hundredths, of which the nodes have so many, none split over two of them."""
    hundredths = [int(cpus * 100 + 1e-6) for cpus in node_cpus]
    fits = (share for share in range(100, 0, -1) if sum(each // share for each in hundredths) >= processes)
    return next(fits, 0) / 100


def _floor(value: float) -> float:
    """Down to hundredths: Ray takes fractions to four digits, people read two."""
    return int(max(value, 0.0) * 100 + 1e-9) / 100
