"""What the ranks of a run tell each other: sums, agreement, and the gradients of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store as _default_store  # torch has no public name for it

_BUCKET_BYTES = 32 * 2**20


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
        """Every rank's value, in rank order, on every rank. For small results such as tracks, not for tensors."""
        ...

    def post(self, text: str) -> None:
        """Leave a text where the others find it, without anybody waiting. Any thread may call it."""
        ...

    def read(self, rank: int) -> str:
        """What a rank posted last, or nothing."""
        ...


class SingleProcess:
    """One rank: nothing to tell anybody."""

    world_size = 1
    rank = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def post(self, text: str) -> None:
        return

    def read(self, rank: int) -> str:
        return ""


class TorchDistributed:
    """The default process group of torch.distributed, which must be initialised (Ray Train does that).

    Tensors may live on any device: NCCL moves only CUDA tensors, so host tensors travel through the rank's own device.

    Args:
        timeout_s: how long `gather` waits for others; None: as long as torch does. `sum_` waits as long as the group.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        nccl = "nccl" in dist.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        patience = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._objects = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))
        # A connection of its own: a call through the group's would wait behind whatever else waits there.
        self._board = dist.PrefixStore("motip", _default_store().clone())

    def sum_(self, tensor: Tensor) -> Tensor:
        carried = self._carried(tensor)
        dist.all_reduce(carried, op=dist.ReduceOp.SUM)
        return tensor if carried is tensor else tensor.copy_(carried)

    def gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._objects)
        return gathered

    def post(self, text: str) -> None:
        self._board.set(str(self.rank), text)

    def read(self, rank: int) -> str:
        key = str(rank)
        # `get` alone would wait for a rank that has not posted yet.
        return self._board.get(key).decode() if self._board.check([key]) else ""

    def _carried(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type and tensor.is_contiguous():
            return tensor
        return tensor.detach().to(self._device).contiguous()


def current_communicator(timeout_s: float | None = None) -> Communicator:
    """The process group where one is initialised, else a single process; see `TorchDistributed`."""
    if dist.is_available() and dist.is_initialized():
        return TorchDistributed(timeout_s)
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
