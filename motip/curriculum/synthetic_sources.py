"""Synthetic sources: the demo dataset, rendered in the raw formats under the storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from motip.config import Curriculum, Source
from motip.demo import write_demo_dataset
from motip.storage.paths import location


def with_synthetic_sources(curriculum: Curriculum, storage: str, note: Callable[[str], None]) -> Curriculum:
    """Render the synthetic sources, if any, under the storage; returns the curriculum with their roots set."""
    sources: dict[str, Source] = {}
    for name, source in curriculum.sources.items():
        if source.synthetic is None:
            sources[name] = source
            continue
        # Raw files stay on the driver's disk, also if the shards go to an object store.
        base = location(storage)
        root = (base if isinstance(base, Path) else Path("~/motip").expanduser()).resolve() / "worlds" / name
        synthetic = source.synthetic
        splits = {
            split: {"sequences": count, "frames": synthetic.frames_of(split), "crowd": synthetic.crowd}
            for split, count in synthetic.sequences.items()
        }
        report = write_demo_dataset(root, seed=synthetic.seed, domains={synthetic.domain: splits}, size=synthetic.size)
        state = "rendered" if report.written else "already rendered"
        note(f"synthetic source {name}: {report.frames} frames {state}, {report.root}")
        rendered = report.source(synthetic.domain)
        sources[name] = source.model_copy(update={"root": rendered["root"], "fps": rendered["fps"]})
    return curriculum.model_copy(update={"sources": sources})
