"""Faster implementations of parts of the network, with equal results to rounding.

`use_fast_ops` replaces operators of training and inference; `prepare_for_inference` returns a detector for frames of
one size. :mod:`motip.model` imports nothing else of this package. The oneDNN products, deformable attention by
``embedding_bag`` and the packed weights are for CPUs, on which the demo and the tests run.
"""

from __future__ import annotations

from motip.model.deformable_attention import prefer_implementations, register_implementation
from motip.model.fast import bag_attention, onednn, triton_attention
from motip.model.fast.frame_detector import Detector, prepare_for_inference
from motip.model.ops import use_implementations

__all__ = ["Detector", "prepare_for_inference", "use_fast_ops"]


def use_fast_ops() -> None:
    """Install the operators of this package for all models of this process."""
    use_implementations(linear=onednn.onednn_linear, pointwise_conv=onednn.onednn_pointwise_conv)
    register_implementation("embedding_bag", bag_attention.bag_attention)
    register_implementation("triton", triton_attention.triton_attention)
    prefer_implementations(triton_attention.preferred_implementation)
