"""Ray Data pipeline of clips; the only module that imports Ray Data.

Every rank builds a dataset from its own rows of the clip plan inside its training worker, instead of splitting one
dataset over the ranks, so that the plan alone assigns clips to ranks. Ray's own split distributes rows in order of
arrival, drops those that do not divide evenly, and is fixed before the first epoch, while every epoch has a different
plan. A dataset may contain the rows of several epochs, which saves restarting the decoding actors.

Actors read and decode the encoded frames. Two buffers per clip pass through the object store: its uint8 pixels, which
the training worker reads in place, and its small labels.
"""

from __future__ import annotations

import pickle
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
from motip.data.host_memory import keep_freed_memory
from motip.errors import MotipError, find_motip_error

if TYPE_CHECKING:
    import ray.data

    from motip.data.batch import ClipBatch

_BLOCK_BYTES = 64 << 20
"""Pixels of the clips of one block, decoded by one actor task. Larger blocks mean fewer of them (1 to 3 ms each in Ray
before the first batch), smaller ones mean less data waiting in the object store."""
_MAX_CLIPS_PER_BLOCK = 16
_YIELD_BYTES = 24 << 20
"""Pixels that an actor collects before it yields a table; each yield costs Ray a few milliseconds of CPU."""
_MIN_CPU_SHARE = 0.1
"""Minimum CPUs per process; more than ten processes per core only queue."""


@dataclass(frozen=True)
class DataResources:
    """Logical CPUs of a training worker and of each of its decoding actors, and the number of actors per worker."""

    worker_cpus: float
    actor_cpus: float
    actors_per_worker: int


def data_resources(
    total_cpus: float, workers: int, actors_per_worker: int, node_cpus: Sequence[float] = ()
) -> DataResources:
    """Divide a cluster's CPUs so that all training workers and all decoding actors run concurrently.

    Ray waits silently for CPUs that never become free, so an infeasible request raises here. On a small machine the
    shares are fractions; half a CPU (or an eighth of a very small machine) stays free for short tasks. The number of
    actors is limited to one per core, since more only take memory and startup time.

    Args:
        total_cpus: logical CPUs of the cluster.
        workers: number of training workers.
        actors_per_worker: requested decoding actors per worker; 0 = the worker decodes itself.
        node_cpus: CPUs of each node, for shares that fit without splitting a process over two nodes; empty = one node.

    Raises:
        MotipError: less than a tenth of a CPU is left for a process; the message has the arithmetic.
    """
    actors_per_worker = min(actors_per_worker, max(1, int(total_cpus // workers)))
    headroom = min(0.5, total_cpus / 8)
    processes = workers * (1 + actors_per_worker)
    even = _floor_hundredths((total_cpus - headroom) / processes)
    share = min(even, _share_per_node(node_cpus or [total_cpus], processes))
    if share < _MIN_CPU_SHARE:
        raise MotipError(
            "the cluster has too few CPUs: training would never start",
            found=f"{total_cpus:g} CPUs, of which {headroom:g} stay free for short tasks",
            expected=f"{workers} workers x ({_MIN_CPU_SHARE} CPU + {actors_per_worker} decoding actors x at least "
            f"{_MIN_CPU_SHARE} CPU)",
            fix="lower NUM_WORKERS (decoding actors per training worker) or --workers, or add nodes",
        )
    return DataResources(share, share if actors_per_worker else 0.0, actors_per_worker)


def clip_dataset(rows: Sequence[ClipRef], loader: ClipLoader, *, actors: int, actor_cpus: float) -> ray.data.Dataset:
    """A dataset of the given clips, in this order, decoded by a pool of actors.

    Args:
        rows: this rank's clips (`motip.data.clips.rank_rows`), of one epoch or several consecutive ones.
        actors, actor_cpus: size of the pool and logical CPUs of each actor (`data_resources`).
    """
    import ray.data

    if not rows:
        raise ValueError("a rank without clips: pad the plan before splitting it over ranks")

    # Limits of the execution.
    pixels = loader.clip_bytes(max(len(clip.positions) for clip in rows))
    per_block = int(np.clip(_BLOCK_BYTES // pixels, 1, _MAX_CLIPS_PER_BLOCK))
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = _YIELD_BYTES  # pass each table on unchanged and immediately
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(
        object_store_memory=max(256 << 20, 4 * actors * per_block * pixels)  # several blocks per actor
    )

    # Row numbers as input, decoded clips as output.
    blocks = [
        pa.table({"row": range(begin, min(begin + per_block, len(rows)))}) for begin in range(0, len(rows), per_block)
    ]
    with ray.data.DataContext.current(context):
        return ray.data.from_arrow(blocks).map_batches(
            _DecodeActor,
            fn_constructor_kwargs={"loader": loader, "rows": rows},
            batch_size=None,  # a complete block; its clips are yielded a few at a time
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=actor_cpus,
        )


def iterate(
    dataset: ray.data.Dataset, rows: Sequence[ClipRef], batch_size: int, prefetch: int = 2
) -> Iterator[ClipBatch]:
    """The batches of one rank: exactly the plan's rows in the plan's order.

    Args:
        dataset: `clip_dataset` of the same ``rows``.
        prefetch: number of batches fetched ahead, one of them collated in another thread; 0 does both on demand.
            It does not affect the content.

    Raises:
        MotipError: a clip cannot be loaded, or Ray delivered other rows than the plan's.
    """
    batches = _batches(dataset, rows, batch_size, prefetch)
    yield from _prefetch_one(batches) if prefetch else batches


def _batches(dataset: ray.data.Dataset, rows: Sequence[ClipRef], batch_size: int, prefetch: int) -> Iterator[ClipBatch]:
    samples: list[ClipSample] = []
    delivered = 0
    try:
        tables: Any = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=max(0, prefetch) * batch_size
        )
        for row, pixels, labels in _iter_packed_clips(tables):
            if delivered >= len(rows) or row != delivered:
                raise _wrong_rows_error(f"row {row} at position {delivered}", rows)
            samples.append(unpack(pixels, labels))
            delivered += 1
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
    except Exception as error:
        problem = find_motip_error(error)
        if problem is None or problem is error:
            raise
        raise problem from error  # the error of the clip, without Ray's wrapping
    if delivered != len(rows) or samples:
        raise _wrong_rows_error(f"{delivered} rows, {len(samples)} of them in an incomplete batch", rows)


def _prefetch_one(batches: Iterator[ClipBatch]) -> Iterator[ClipBatch]:
    """Collate the next batch in another thread; copying long clips to pad them takes a tenth of a step."""
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
    finally:  # also if the consumer stops early: the thread must end
        stopped.set()


def _iter_packed_clips(tables: Iterator[pa.Table]) -> Iterator[tuple[int, pa.Buffer, pa.Buffer]]:
    """Row number, pixels and labels of each clip, zero-copy."""
    for table in tables:
        yield from zip(
            table["row"].to_pylist(), _iter_buffers(table["pixels"]), _iter_buffers(table["labels"]), strict=True
        )


def _iter_buffers(column: pa.ChunkedArray) -> Iterator[pa.Buffer]:
    """Zero-copy buffer of each value; an Arrow scalar, ``column[i]``, would be a copy."""
    for chunk in column.chunks:
        _, ends, content = chunk.buffers()
        offsets = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        for begin, end in pairwise(offsets.tolist()):
            yield content.slice(begin, end - begin)


def pack(sample: ClipSample) -> tuple[np.ndarray, np.ndarray]:
    """Serialise a clip to two flat uint8 arrays: its pixels, and everything else."""
    labels = {name: value for name, value in vars(sample).items() if name != "images"}
    text = pickle.dumps((sample.images.shape, labels), protocol=5)
    return np.ascontiguousarray(sample.images).reshape(-1), np.frombuffer(text, np.uint8)


def unpack(pixels: Any, packed: Any) -> ClipSample:
    """Inverse of `pack`; the images are a read-only view of ``pixels``."""
    shape, labels = pickle.loads(packed)  # noqa: S301 - written by `pack` in this run
    return ClipSample(images=np.frombuffer(pixels, np.uint8).reshape(shape), **labels)


class _DecodeActor:
    """Ray actor that decodes clips; keeps shards open between blocks."""

    def __init__(self, loader: ClipLoader, rows: Sequence[ClipRef]) -> None:
        import cv2

        cv2.setNumThreads(1)  # actors are the parallelism; more threads would compete with the training worker
        keep_freed_memory()
        self.loader, self.rows = loader, rows

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        ready: list[tuple[int, np.ndarray, np.ndarray]] = []
        for row in block["row"].to_pylist():
            ready.append((row, *pack(self.loader.load(self.rows[row]))))
            if sum(pixels.nbytes for _, pixels, _ in ready) >= _YIELD_BYTES:
                yield _clip_table(ready)
                ready = []
        if ready:
            yield _clip_table(ready)


def _clip_table(clips: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> pa.Table:
    rows, pixels, labels = zip(*clips, strict=True)
    return pa.table(
        {"row": pa.array(rows, pa.int64()), "pixels": _binary_column(pixels), "labels": _binary_column(labels)}
    )


def _binary_column(arrays: Sequence[np.ndarray]) -> pa.ChunkedArray:
    """One value per array, each a separate chunk that shares the array's memory."""
    chunks = []
    for array in arrays:
        ends = pa.array([0, array.nbytes], pa.int64()).buffers()[1]
        chunks.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(array)]))
    return pa.chunked_array(chunks)


def _wrong_rows_error(found: str, rows: Sequence[ClipRef]) -> MotipError:
    return MotipError(
        "Ray Data did not deliver the rows of the clip plan",
        found=found,
        expected=f"rows 0..{len(rows) - 1}, each once and in order",
        fix="report this with your Ray version; --set NUM_WORKERS=0 decodes without Ray Data",
    )


def _share_per_node(node_cpus: Sequence[float], processes: int) -> float:
    """Largest share of a CPU, in hundredths, at which ``processes`` fit on the nodes without splitting one."""
    hundredths = [int(cpus * 100 + 1e-6) for cpus in node_cpus]
    fits = (share for share in range(100, 0, -1) if sum(each // share for each in hundredths) >= processes)
    return next(fits, 0) / 100


def _floor_hundredths(value: float) -> float:
    """``value`` rounded down to hundredths (Ray accepts four digits; two are readable)."""
    return int(max(value, 0.0) * 100 + 1e-9) / 100
