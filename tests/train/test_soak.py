"""Memory of two thousand training steps of the tiny model does not grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import motip.train.loop as loop
from motip.events import Event, StepLogged
from motip.train.timing import resident_bytes
from tests.helpers.small_training import small_config
from tests.helpers.training_run import train_in_process
from tests.train.test_loop import SETTINGS, job_of, write_video

EPOCHS, PART = 4, 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of a stage: decoding, augmentation to a few sizes, steps, step records and checkpoints."""
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})
    # Four image sizes. Each new size allocates memory that is kept; hundreds of sizes would grow for some 700 steps,
    # which looks like a leak.
    sizes = {"AUG_RESIZE_SCALES": [48, 64], "AUG_RANDOM_CROP_MIN": 64, "AUG_RANDOM_CROP_MAX": 64}
    schedule = {"EPOCHS": EPOCHS, "CLIPS_PER_EPOCH": PART, "LOG_EVERY_STEPS": 1, "CHECKPOINT_EVERY_STEPS": 200}
    config = small_config(**(SETTINGS | sizes | schedule), MEMORY_EFFICIENT=True, ACCUMULATE_STEPS=2)
    job = job_of(config, tmp_path, [write_video(tmp_path, f"v{n}", frames=70, region=bool(n % 2)) for n in range(8)])
    resident: list[int] = []

    def sample(event: Event) -> None:
        if isinstance(event, StepLogged):
            resident.append(resident_bytes())

    train_in_process(job, tmp_path / "out", sample)
    assert len(resident) == EPOCHS * PART
    means = [sum(resident[at : at + PART]) / PART for at in range(0, len(resident), PART)]
    print("resident, mean of each 500 steps:", ", ".join(f"{mean / 2**20:.1f} MB" for mean in means))
    assert means[-1] <= 1.02 * means[0], f"{means[-1] / means[0]:.3f} times the first {PART} steps"
