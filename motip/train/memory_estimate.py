"""Peak memory of a training step, estimated by running the step on fake tensors (shapes without values).

Every storage that the step allocates is counted until it is freed: parameters, images, tensors saved by autograd or
recomputed by a checkpoint, gradients. The optimiser's state is added. Not included are the workspaces of kernels
(cuDNN), fragmentation and the CUDA context; the memory margin of the preflight covers them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.losses.matcher import DetectionTargets, Matcher
from motip.model import ModelSpec, build_model
from motip.model.deformable_attention import log_implementation, use_implementation
from motip.train.losses import BatchCounts, LossSettings, clip_losses
from motip.train.oom import OomFallback, downscaled
from motip.train.optimizer import freeze_parameters
from motip.train.step import autocast_dtype

_FLOAT32_ON_CUDA = frozenset(
    {torch.layer_norm, torch.nn.functional.layer_norm, torch.group_norm, torch.nn.functional.group_norm}
    | {torch.softmax, Tensor.softmax, torch.nn.functional.softmax, torch.log, Tensor.log, torch.exp, Tensor.exp}
    | {torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.pow, Tensor.pow}
)
"""Functions called by the model that autocast computes in float32 on CUDA and in half precision on a CPU."""


def precision_on(device_type: str, config: Config) -> torch.dtype | None:
    """The autocast dtype on a device of this type, None for float32; CUDA devices are assumed to support bf16."""
    if device_type == "cuda" and config.MIXED_PRECISION is None:
        return torch.bfloat16
    return autocast_dtype(config.MIXED_PRECISION, torch.device("cpu"))


def estimate_peak(config: Config, batch: ClipBatch, fallback: OomFallback, device_type: str = "cuda") -> int:
    """Peak bytes of tensors on the device in a training step of this batch with this fallback.

    The optimiser's moments are allocated, and with ACCUMULATE_STEPS above 1 also accumulated gradients.

    Args:
        batch: clips on the CPU; only their shapes matter.
        device_type: `cuda` or `cpu`; determines precision and the implementation of deformable attention.
    """
    batch = downscaled(batch, fallback.scale)
    objects = sum(len(frame) for clip in batch.boxes_cxcywh for frame in clip)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _attention_for(device_type), fake, _CudaSemantics(device_type, objects):
        model = build_model(ModelSpec.from_config(config)).train()
        freeze_parameters(model, config)
        settings = LossSettings.from_config(config, precision_on(device_type, config))
        matcher = _FirstQueriesMatcher(**vars(settings.criterion.matcher))
        settings = replace(settings, criterion=replace(settings.criterion, matcher=matcher))
        inputs: list[Tensor] = []

        def faked(tensor: Tensor) -> Tensor:
            inputs.append(fake.from_tensor(tensor))
            return inputs[-1]

        batch = _map_tensors(batch, faked)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tracker = LiveStorages()
        tracker.add([*model.parameters(), *model.buffers(), *inputs])
        with tracker:
            order = list(range(batch.images.shape[1]))
            loss = clip_losses(model, batch, order, fallback, settings, BatchCounts(1, 1, 1)).total
            if loss.requires_grad:
                # Not loss.backward(): it would disable the function mode, which recomputed layers need.
                _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        weights = _bytes([*model.parameters(), *model.buffers()])
    moments = 2 * _bytes(trained)
    accumulated = _bytes(trained) if config.ACCUMULATE_STEPS > 1 else 0
    largest = max((_bytes([parameter]) for parameter in trained), default=0)
    # AdamW computes the square roots of all second moments in one kernel on a GPU, one tensor at a time on a CPU.
    scratch = _bytes(trained) if device_type == "cuda" else 2 * largest
    return max(tracker.peak + moments + accumulated, weights + moments + _bytes(trained) + scratch)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, until they are freed.

    Attributes:
        live, peak: bytes now, and the maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages or tensor.device.type == "meta":
                continue
            size = storage.nbytes()
            self._storages[key] = weakref.ref(storage, self._on_free(key, size))
            self.live += size
        self.peak = max(self.peak, self.live)

    def _on_free(self, key: int, size: int) -> Callable[[Any], None]:
        def free(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        return free

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class _FirstQueriesMatcher(Matcher):
    """Assigns object i to query i (modulo the queries), after computing the costs for their memory."""

    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: DetectionTargets) -> Tensor:
        layers, _, queries, _ = logits.shape
        with torch.no_grad():
            costs = torch.stack([self.cost(logits[n], boxes_cxcywh[n], targets) for n in range(layers)])
        return torch.arange(costs.shape[1]).remainder(queries).expand(layers, -1).contiguous()


class _CudaSemantics(TorchFunctionMode):
    """Adjusts calls that differ between real and fake tensors, and between autocast of a CPU and of CUDA.

    Args:
        objects: objects of the batch, the length of the only tensor whose length depends on values.
    """

    def __init__(self, device_type: str, objects: int) -> None:
        super().__init__()
        self._cuda = device_type == "cuda"
        self._objects = objects

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.repeat_interleave and isinstance(args[1], Tensor) and "output_size" not in kwargs:
            kwargs = {**kwargs, "output_size": self._objects}
        if self._cuda and func in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _attention_for(device_type: str) -> Iterator[None]:
    """Inside the block deformable attention has the implementation that the device would use."""
    chosen = log_implementation()
    if chosen == "auto":
        use_implementation("triton" if device_type == "cuda" else "embedding_bag")
    try:
        yield
    finally:
        use_implementation(chosen)


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with ``function`` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return [_map_tensors(item, function) for item in value] if isinstance(value, list) else value


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
