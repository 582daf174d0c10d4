"""Hyper-parameter sweeps over one stage, on Ray Tune."""

from motip.tune.stage_tuner import StageTuner, run_sweep
from motip.tune.sweep import SweepResult, Tuning

__all__ = ["StageTuner", "SweepResult", "Tuning", "run_sweep"]
