"""Demo dataset: seeded synthetic scenes of three domains, written as raw BDD100K, VisDrone and DanceTrack folders."""

from motip.demo.dataset import DEMO_DATASET, DatasetReport, write_demo_dataset

__all__ = ["DEMO_DATASET", "DatasetReport", "write_demo_dataset"]
