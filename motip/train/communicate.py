"""What the ranks of a run tell each other: sums, agreement, and the gradients of one step."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from motip.errors import MotipError

_BUCKET_BYTES = 32 * 2**20
_PATIENCE = timedelta(days=1)

_log = logging.getLogger(__name__)


class Communicator(Protocol):
    """The few collectives that training needs; every rank must call each of them in the same order."""

    @property
    def world_size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. For small results such as tracks, not for tensors.

        Waits as long as it takes: tracking and scoring the validation videos, or writing a checkpoint, is no stall.
        """
        ...


class SingleProcess:
    """One rank: nothing to tell anybody."""

    world_size = 1
    rank = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]


class TorchDistributed:
    """The default process group of torch.distributed, which must be initialised (Ray Train does that).

    Tensors may live on any device: NCCL moves only CUDA tensors, so host tensors travel through the rank's own device.
    """

    def __init__(self) -> None:
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        nccl = "nccl" in dist.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def sum_(self, tensor: Tensor) -> Tensor:
        carried = self._carried(tensor)
        dist.all_reduce(carried, op=dist.ReduceOp.SUM)
        return tensor if carried is tensor else tensor.copy_(carried)

    def gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._patient)
        return gathered

    def _carried(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type and tensor.is_contiguous():
            return tensor
        return tensor.detach().to(self._device).contiguous()


class WorkerLost(RuntimeError):
    """Another rank died or stalled. No MotipError: Ray starts the workers again after it, and that may cure it."""


class Watched:
    """A communicator that says where training stood when another rank did not answer in time.

    `gather` has no such time, since others may be validating or saving: it says again and again that it waits.

    Args:
        inner: the ranks.
        timeout_s: for the messages; the process group itself keeps the time.

    Attributes:
        where: says which stage, epoch, step and clips training is at.
    """

    def __init__(self, inner: Communicator, timeout_s: float) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self.world_size = inner.world_size
        self.rank = inner.rank
        self.where: Callable[[], str] = lambda: "before the first step"

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._watching():
            return self._inner.sum_(tensor)

    def gather(self, value: Any) -> list[Any]:
        with self._telling():
            return self._inner.gather(value)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        # Where NCCL's watchdog ends the process without an exception, this line is what the log has.
        alarm = threading.Timer(0.9 * self._timeout_s, self._waiting)
        alarm.daemon = True
        if self.world_size > 1:
            alarm.start()
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            problem = MotipError(
                f"rank {self.rank} of {self.world_size} got no answer from another worker",
                where=self.where(),
                found=f"{str(error).splitlines()[0][:200]} (after {time.monotonic() - begin:.0f} s)",
                expected=f"an answer within {self._timeout_s:g} s (COLLECTIVE_TIMEOUT_S)",
                fix="look for the worker that stopped or is far slower than the others (its own log, its memory); "
                "run the same command again to go on from the last checkpoint",
            )
            raise WorkerLost(problem.render()) from error
        finally:
            alarm.cancel()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        arrived = threading.Event()
        if self.world_size > 1:
            threading.Thread(target=self._tell, args=(arrived,), daemon=True).start()
        try:
            yield
        finally:
            arrived.set()

    def _tell(self, arrived: threading.Event) -> None:
        begin = time.monotonic()
        while not arrived.wait(self._timeout_s):
            _log.warning(
                "rank %d has waited %.1f min for the other workers: %s; it goes on waiting",
                self.rank,
                (time.monotonic() - begin) / 60,
                self.where(),
            )

    def _waiting(self) -> None:
        _log.error(
            "rank %d has waited %.0f s for another worker: %s; at %.0f s training ends",
            self.rank,
            0.9 * self._timeout_s,
            self.where(),
            self._timeout_s,
        )


def current_communicator() -> Communicator:
    """The process group where one is initialised, else a single process."""
    if dist.is_available() and dist.is_initialized():
        return TorchDistributed()
    return SingleProcess()


@torch.no_grad()
def all_reduce_gradients(
    parameters: Iterable[nn.Parameter], comm: Communicator, bucket_bytes: int = _BUCKET_BYTES
) -> None:
    """Sum the gradients over ranks, in place.

    Losses are divided by the objects of the global batch, so the sum is the gradient of the global batch; nothing is
    averaged. A parameter that got a gradient on some ranks only counts as zero on the others, and one that got none
    anywhere keeps None (so that the optimiser leaves it alone): ranks whose clips use different parts of the network,
    or that have no clip at all, stay in step.

    Args:
        parameters: the same parameters in the same order on every rank.
        comm: the ranks.
        bucket_bytes: gradients are flattened into messages of about this size.
    """
    trained = [p for p in parameters if p.requires_grad]
    if comm.world_size == 1 or not trained:
        return
    present = comm.sum_(torch.tensor([float(p.grad is not None) for p in trained])).tolist()
    shared = [p for p, ranks in zip(trained, present, strict=True) if ranks > 0]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(shared, bucket_bytes):
        gradients = [p.grad for p in bucket if p.grad is not None]
        flat = comm.sum_(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type and device, up to the given size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        kin = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not kin or size + parameter.nbytes > bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
