"""The only room that reads YAML: stage configurations and curriculum files, checked before hours are spent on them."""

from motip.config.curriculum_file import Curriculum, Domains, Mix, Source, Stage, load_curriculum
from motip.config.keys import ClipSchedule, Config, record_reads
from motip.config.yaml_chain import load_config, without_effect_message

__all__ = [
    "ClipSchedule",
    "Config",
    "Curriculum",
    "Domains",
    "Mix",
    "Source",
    "Stage",
    "load_config",
    "load_curriculum",
    "record_reads",
    "without_effect_message",
]
