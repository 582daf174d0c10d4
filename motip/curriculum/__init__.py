"""Curriculum: stage graph, stage records, training of stages, and domain scores after each stage."""

from motip.curriculum.records import Options, StageRecord
from motip.curriculum.run import CurriculumResult, run_curriculum

__all__ = ["CurriculumResult", "Options", "StageRecord", "run_curriculum"]
