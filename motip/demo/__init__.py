"""The demo world: seeded scenes of three domains, written as raw BDD100K, VisDrone and DanceTrack folders."""

from motip.demo.world import DEMO_WORLD, WorldReport, write_world

__all__ = ["DEMO_WORLD", "WorldReport", "write_world"]
