"""Collectives between the ranks: sums, all-gather, and the all-reduce of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 32 * 2**20


class ProcessGroup(Protocol):
    """The collectives that training needs; every rank must call each of them in the same order."""

    @property
    def world_size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. For small results such as tracks, not for tensors."""
        ...


class SingleProcess:
    """Process group of one rank."""

    world_size = 1
    rank = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class TorchDistributed:
    """The default process group of torch.distributed, which must be initialised (Ray Train does that).

    Tensors may be on any device: NCCL accepts only CUDA tensors, so CPU tensors are copied through the rank's GPU.

    Args:
        timeout_s: timeout of `all_gather`; None: torch's default. `sum_` has the timeout of the default group.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        nccl = "nccl" in dist.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        self._object_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

    def sum_(self, tensor: Tensor) -> Tensor:
        on_device = self._on_group_device(tensor)
        dist.all_reduce(on_device, op=dist.ReduceOp.SUM)
        return tensor if on_device is tensor else tensor.copy_(on_device)

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._object_group)
        return values

    def _on_group_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type and tensor.is_contiguous():
            return tensor
        return tensor.detach().to(self._device).contiguous()


def current_process_group(timeout_s: float | None = None) -> ProcessGroup:
    """The default process group if one is initialised, else a single process; see `TorchDistributed`."""
    if dist.is_available() and dist.is_initialized():
        return TorchDistributed(timeout_s)
    return SingleProcess()


@torch.no_grad()
def all_reduce_gradients(
    parameters: Iterable[nn.Parameter], comm: ProcessGroup, bucket_bytes: int = _BUCKET_BYTES
) -> None:
    """Sum the gradients over ranks, in place.

    Losses are divided by the objects of the global batch, so the sum is the gradient of the global batch; nothing is
    averaged. A parameter with a gradient on some ranks only counts as zero on the others, and one without a gradient on
    any rank keeps None (so that the optimiser skips it): ranks whose clips use different parts of the network, or that
    have no clip at all, keep identical weights.

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
    """Consecutive parameters of one dtype and device, up to the given size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        same_kind = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not same_kind or size + parameter.nbytes > bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
