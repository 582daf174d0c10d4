"""Curriculum: stage graph, stage records, training of stages, and domain scores after each stage."""

from motip.curriculum.options import Options
from motip.curriculum.run import CurriculumResult, run_curriculum
from motip.stage_folder import StageRecord

__all__ = ["CurriculumResult", "Options", "StageRecord", "run_curriculum"]
