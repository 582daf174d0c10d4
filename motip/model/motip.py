"""MOTIP module: detector, trajectory modelling, ID decoder (MOTIP, figure 2)."""

from __future__ import annotations

from torch import Tensor, nn

from motip.model.detector import DeformableDetr, DetectorOutput
from motip.model.id_decoder import IdDecoder, TrajectoryModeling
from motip.model.spec import ModelSpec


class MOTIP(nn.Module):
    """Submodules ``detr``, ``trajectory_modeling`` and ``id_decoder`` under the published state-dict keys.

    With ONLY_DETR the last two are None and have no keys in the state dict.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.detr = DeformableDetr(spec)
        self.trajectory_modeling: TrajectoryModeling | None = None
        self.id_decoder: IdDecoder | None = None
        if not spec.only_detr:
            self.trajectory_modeling = TrajectoryModeling(spec)
            self.id_decoder = IdDecoder(spec)

    def forward(self, images: Tensor, mask: Tensor) -> DetectorOutput:
        """Detector forward pass: images (B,3,H,W) normalised, mask (B,H,W) bool, True on padding."""
        return self.detr(images, mask)
