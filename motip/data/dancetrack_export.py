"""Export of shards to a DanceTrack folder, for the published code and its tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

from motip.data.formats.dancetrack_writer import seqmap_path, write_dancetrack, write_seqmap
from motip.data.manifest import Manifest, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import Shard
from motip.errors import MotipError
from motip.storage.paths import Location


def export_dancetrack(
    manifest: Manifest,
    storage: Location | str,
    root: Path | str,
    class_names: SequenceOf[str],
    classes: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, dict[str, int]]:
    """Write the videos of some sources as ``<root>/<split>/<video>/`` with ``<root>/<split>_seqmap.txt``.

    Args:
        class_names: classes in the order of their ids.
        classes: source -> class -> raw categories; only these sources are exported.

    Returns:
        split -> counts of ``videos``, ``frames``, ``objects`` and ``ignored`` boxes.

    Raises:
        MotipError: no video of these sources in the manifest.
    """
    chosen = [entry for entry in manifest.videos if entry.source in classes]
    if not chosen:
        raise MotipError(
            "nothing to export: the manifest has no video of these sources",
            where=storage,
            found=", ".join(manifest.sources()) or "no sources",
            expected="one of " + ", ".join(sorted(classes)),
            fix="run the conversion first",
        )
    shared = Counter((entry.split, entry.video) for entry in chosen)
    written: dict[str, Counter[str]] = {}
    names: dict[str, list[str]] = {}
    for entry in chosen:
        is_shared = shared[entry.split, entry.video] > 1
        name = f"{entry.source}_{entry.video}" if is_shared else entry.video
        shard = Shard(entry_path(storage, entry))
        class_map = ClassMap.among(tuple(class_names), classes[entry.source])
        counts = write_dancetrack(replace(shard.read_labels(), name=name), root, entry.split, class_map, shard)
        written.setdefault(entry.split, Counter()).update({"videos": 1, **counts})
        names.setdefault(entry.split, []).append(name)
    for split, videos in names.items():
        write_seqmap(seqmap_path(root, split), videos)
    return {split: dict(counts) for split, counts in written.items()}
