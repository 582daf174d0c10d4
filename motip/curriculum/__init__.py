"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from motip.curriculum.records import Options, StageRecord, Tuning
from motip.curriculum.run import CurriculumResult, run_curriculum, run_sweep
from motip.tune.sweep import SweepResult

__all__ = ["CurriculumResult", "Options", "StageRecord", "SweepResult", "Tuning", "run_curriculum", "run_sweep"]
