"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from motip.curriculum.records import Options, StageRecord
from motip.curriculum.run import CurriculumResult, run_curriculum

__all__ = ["CurriculumResult", "Options", "StageRecord", "run_curriculum"]
