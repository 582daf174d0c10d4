"""The demo world: seeded scenes of three domains, written as raw BDD100K, VisDrone and DanceTrack folders."""




