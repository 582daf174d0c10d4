"""Sources that are drawn rather than recorded: the demo's input, written in the raw formats under the storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from motip.config import Curriculum, Source
from motip.demo import write_world
from motip.storage.paths import location


def with_worlds(curriculum: Curriculum, storage: str, note: Callable[[str], None]) -> Curriculum:
    """Draw the synthetic sources, if any, under the storage; their roots then point there."""
    sources: dict[str, Source] = {}
    for name, source in curriculum.sources.items():
        if source.synthetic is None:
            sources[name] = source
            continue
        # Raw files are drawn once on the driver's disk, also where the shards go to an object store.
        place = location(storage)
        root = (place if isinstance(place, Path) else Path("~/motip").expanduser()).resolve() / "worlds" / name
        world = source.synthetic
        splits = {
            split: {"sequences": count, "frames": world.frames_of(split), "crowd": world.crowd}
            for split, count in world.sequences.items()
        }
        report = write_world(root, seed=world.seed, domains={world.domain: splits}, size=world.size)
        note(f"world {name}: {report.frames} frames {'drawn' if report.written else 'drawn before'}, {report.root}")
        drawn = report.source(world.domain)
        sources[name] = source.model_copy(update={"root": drawn["root"], "fps": drawn["fps"]})
    return curriculum.model_copy(update={"sources": sources})
