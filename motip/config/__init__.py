"""Configuration: the only package that reads YAML; stage configurations, curriculum, experiment and sweep files."""

from motip.config.curriculum_file import Curriculum, DatasetFormat, Domains, Mix, Source, Stage, load_curriculum
from motip.config.keys import ClipSchedule, Config
from motip.config.yaml_chain import load_config, without_effect_message

__all__ = [
    "ClipSchedule",
    "Config",
    "Curriculum",
    "DatasetFormat",
    "Domains",
    "Mix",
    "Source",
    "Stage",
    "load_config",
    "load_curriculum",
    "without_effect_message",
]
