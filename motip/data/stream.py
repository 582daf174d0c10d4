"""Clips through Ray Data: the only file that knows it.

Every rank builds a dataset of its own rows of the clip plan inside its training worker, instead of splitting one
dataset over the ranks: which rank gets which clip is then decided by the plan alone. Ray's own split hands rows out
in the order in which they happen to arrive, drops those that do not divide evenly, and is fixed before the first
epoch, while every epoch has another plan. A dataset may hold the rows of several epochs, which saves starting the
decoding actors anew for each of them.

Encoded frames are read and decoded in the actors; one packed buffer per clip crosses the object store (uint8 pixels
and ragged labels side by side, no pickle), and the training worker reads it in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
LEAST_SHARE = 0.1
"""CPUs below which a process is refused: ten processes per core only queue up."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class DataResources:
    """Logical CPUs of one training worker and of each of its decoding actors, and how many actors it gets."""

    worker_cpus: float
    actor_cpus: float
    actors_per_worker: int


def data_resources(
    total_cpus: float, workers: int, actors_per_worker: int, worker_cpus: float | None = None
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

    Raises:
        MotipError: with the arithmetic, when less than a tenth of a CPU is left for a process.
    """
    actors_per_worker = min(actors_per_worker, max(1, int(total_cpus // workers)))
    headroom = min(0.5, total_cpus / 8)
    room = total_cpus - headroom
    if worker_cpus is None:
        share = min(1.0, _floor(room / (workers * (1 + actors_per_worker))))
        worker_cpus = actor_cpus = share
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
    context.target_max_block_size = 1 << 20  # a clip leaves its actor as soon as it is ready, not with its block
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
            batch_size=None,  # a whole block; its clips are yielded one by one
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
        prefetch: batches fetched ahead; has no influence on what is delivered.

    Raises:
        MotipError: a clip cannot be loaded, or Ray delivered other rows than the plan's.
    """
    samples: list[ClipSample] = []
    delivered = 0
    try:
        tables: Any = dataset.iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=max(0, prefetch) * batch_size
        )
        for table in tables:
            if delivered >= len(rows) or table["row"][0].as_py() != delivered:
                raise _wrong_rows(f"row {table['row'][0].as_py()} in place {delivered}", rows)
            samples.append(unpack(table["clip"].chunk(0)[0].as_buffer()))
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


def pack(sample: ClipSample) -> np.ndarray:
    """One clip as flat bytes: length of the header, JSON header, then the arrays, each on a 64-byte border."""
    arrays = {"images": sample.images}
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
    slots = sample.slots and (sample.slots.distractors, sample.slots.dropped)
    header = json.dumps({"name": sample.name, "weight": sample.weight, "slots": slots, "arrays": entries}).encode()
    begin = _aligned(8 + len(header))
    packed = np.zeros(begin + offset, dtype=np.uint8)
    packed[:8].view(np.int64)[0] = len(header)
    packed[8 : 8 + len(header)] = np.frombuffer(header, np.uint8)
    for (_, _, _, at), array in zip(entries, arrays.values(), strict=True):
        packed[begin + at : begin + at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Any) -> ClipSample:
    """Inverse of `pack`; the arrays are read-only views of the buffer."""
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
        images=arrays["images"],
        boxes_cxcywh=ragged("boxes_cxcywh"),
        classes=ragged("classes"),
        ignore_cxcywh=ragged("ignore_cxcywh"),
        slots=slots,
        name=header["name"],
        weight=header["weight"],
    )


class _DecodeActor:
    """Lives in a process of its own; keeps shard footers open between clips."""

    def __init__(self, loader: ClipLoader) -> None:
        import cv2

        cv2.setNumThreads(1)  # the pool is the parallelism; more threads would take the training worker's cores
        self.loader = loader

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for row, clip in zip(block["row"].to_pylist(), block["clip"].to_pylist(), strict=True):
            packed = pack(self.loader.load(ClipRef.from_json(clip)))
            ends = pa.array([0, packed.nbytes], pa.int64()).buffers()[1]
            column = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(packed)])
            yield pa.table({"row": [row], "clip": column})


def _wrong_rows(found: str, rows: Sequence[ClipRef]) -> MotipError:
    return MotipError(
        "Ray Data did not deliver the clip plan",
        found=found,
        expected=f"rows 0..{len(rows) - 1}, each once and in order",
        fix="report this with your Ray version; --set NUM_WORKERS=0 decodes without Ray Data",
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _floor(value: float) -> float:
    """Down to hundredths: Ray takes fractions to four digits, people read two."""
    return int(max(value, 0.0) * 100 + 1e-9) / 100
