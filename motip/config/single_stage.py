"""One stage's configuration as a curriculum of its own: the published keys say which data, weights and validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from motip.config.curriculum_file import DEFAULT_CLASSES, DEFAULT_FPS, Curriculum, Domains, Mix, Source, Stage
from motip.config.keys import Config
from motip.errors import MotipError

VALIDATION = "validation"
"""Name of the source that val_config.GT_FOLDER becomes."""


@dataclass(frozen=True)
class KnownDataset:
    """A name that DATASETS may hold: its raw format, domain, and the folders it is looked for in."""

    format: Literal["bdd100k", "visdrone", "motchallenge"]
    domain: Literal["dance", "ground", "aerial"]
    folders: tuple[str, ...]


KNOWN_DATASETS = {
    "BDD100K": KnownDataset("bdd100k", "ground", ("bdd100k", "BDD100K")),
    "VisDrone": KnownDataset("visdrone", "aerial", ("visdrone", "VisDrone")),
    "DanceTrack": KnownDataset("motchallenge", "dance", ("DanceTrack", "dancetrack")),
}


def single_stage(
    config: Config, data_root: str, category_names: Sequence[str], *, videos: int | None = None
) -> Curriculum:
    """Build the curriculum that trains ``config`` alone.

    Sources come from DATASETS, DATASET_SPLITS and DATASET_WEIGHTS, looked for in DATA_ROOT under the data root and in
    the data root itself. The stage is judged on their ``val`` splits, or on val_config.GT_FOLDER alone (of it,
    the sequences in SEQMAP_FILE) where that folder is there. Weights are DETR_PRETRAIN's, fresh where it is null.

    Args:
        data_root: folder that holds the raw datasets.
        category_names: what the readers call class 1, 2, … of a gt.txt that has no labels.txt beside it.
        videos: training videos of each source, None for all.

    Raises:
        MotipError: an unknown dataset, lists of different lengths, a dataset or class that is not there.
    """
    roots = _search_roots(config, data_root)
    sources: dict[str, Source] = {}
    mixes: list[Mix] = []
    validation = _validation(config, roots[-1], category_names)
    for dataset, split, weight in _datasets(config):
        splits = {"train": split} if validation is not None else {"train": split, "val": "val"}
        source = _source(dataset, splits, config, roots, category_names)
        sources[source.name] = source
        mixes.append(Mix(source=source.name, videos=videos, frame_budget=None, weight=weight))
    if validation is not None:
        sources[VALIDATION] = validation
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.name).lstrip("_.-") or "stage"
    stage = Stage(name=name, config=config, data=tuple(mixes), val=None if validation is None else (VALIDATION,))
    # Alone, a stage knows one domain only: its own, which it is judged on as it is.
    return Curriculum(name=name, sources=sources, stages=(stage,), domains=Domains(score="none"))


def _search_roots(config: Config, data_root: str) -> list[Path]:
    if "://" in data_root:
        raise MotipError(
            "a stage on its own is trained from a local data root",
            where="--data-root",
            found=data_root,
            fix="mount the data, or name it in a curriculum file and run ray_jobs/curriculum.py",
        )
    root = Path(data_root).expanduser()
    inner = root / config.DATA_ROOT
    return [inner, root] if inner.is_dir() and inner.resolve() != root.resolve() else [root]


def _datasets(config: Config) -> list[tuple[str, str, float]]:
    """(dataset, training split, weight) for each entry of DATASETS."""
    names = config.DATASETS
    folded = {name.lower(): name for name in KNOWN_DATASETS}
    strangers = [name for name in names if name.lower() not in folded]
    if strangers or not names:
        raise MotipError(
            f"unknown dataset {strangers[0]}" if strangers else "no dataset to train on",
            where=f"DATASETS ({config.origin('DATASETS')})",
            found=", ".join(names) or "an empty list",
            expected="some of " + ", ".join(KNOWN_DATASETS),
            fix="data in another place or form is a source of a curriculum file (see configs/curriculum.yaml)",
        )
    if len({name.lower() for name in names}) < len(names):
        raise MotipError("a dataset is named twice", where=f"DATASETS ({config.origin('DATASETS')})", found=names)
    splits = config.DATASET_SPLITS * len(names) if len(config.DATASET_SPLITS) == 1 else config.DATASET_SPLITS
    weights = config.DATASET_WEIGHTS or (1.0,) * len(names)
    for key, values in (("DATASET_SPLITS", splits), ("DATASET_WEIGHTS", weights)):
        if len(values) != len(names):
            raise MotipError(
                f"{key} needs an entry for every dataset",
                where=f"{key} ({config.origin(key)})",
                found=f"{len(values)} entries",
                expected=f"{len(names)}, for {', '.join(names)}",
            )
    return [(folded[name.lower()], split, weight) for name, split, weight in zip(names, splits, weights, strict=True)]


def _source(
    name: str, splits: dict[str, str], config: Config, roots: Sequence[Path], category_names: Sequence[str]
) -> Source:
    known = KNOWN_DATASETS[name]
    candidates = [root / folder for root in roots for folder in known.folders]
    root = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if root is None:
        raise MotipError(
            f"the dataset {name} is not there",
            where=f"DATASETS ({config.origin('DATASETS')}), --data-root",
            expected=" or ".join(map(str, candidates)),
            fix="put it there (a link will do), or pass --data-root the folder that holds it",
        )
    if known.format == "motchallenge":
        classes = _classes_by_number(config, [root / folder for folder in splits.values()], category_names)
    else:
        defaults = DEFAULT_CLASSES[known.format]
        classes = {label: defaults.get(label, (label,)) for label in config.class_names}
    values: dict[str, Any] = {
        "format": known.format,
        "root": str(root.resolve()),
        "domain": known.domain,
        "splits": splits,
        "classes": classes,
        "fps": DEFAULT_FPS.get(known.format),
    }
    return Source(name=name.lower(), **values)


def _validation(config: Config, data_root: Path, category_names: Sequence[str]) -> Source | None:
    """GT_FOLDER as a source, if it is there."""
    named = config.val_config.GT_FOLDER
    if not named or not (data_root / named).is_dir():
        return None
    folder = (data_root / named).resolve()
    values: dict[str, Any] = {
        "format": "motchallenge",
        "root": str(folder.parent),
        "domain": KNOWN_DATASETS[_datasets(config)[0][0]].domain,
        "splits": {"val": folder.name},
        "sequences": _listed(config, data_root),
        "classes": _classes_by_number(config, [folder], category_names),
    }
    return Source(name=VALIDATION, **values)


def _listed(config: Config, data_root: Path) -> dict[str, tuple[str, ...]]:
    """The validation sequences that SEQMAP_FILE names, if it is there."""
    named = config.val_config.SEQMAP_FILE
    if not named or not (data_root / named).is_file():
        return {}
    lines = [line.strip() for line in (data_root / named).read_text().splitlines() if line.strip()]
    names = tuple(lines[1:] if lines[:1] == ["name"] else lines)
    if not names:
        raise MotipError("the sequence map names no sequence", where=data_root / named, expected="one name a line")
    return {"val": names}


def _classes_by_number(
    config: Config, folders: Sequence[Path], category_names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Class to the category that the reader makes of its number in gt.txt; CLASS_NAME_TO_ID holds the numbers."""
    label_files = [file for folder in folders for file in sorted(folder.glob("*/gt/labels.txt"))]
    ground_truths = [file for folder in folders for file in folder.glob("*/gt/gt.txt")]
    if label_files and len(label_files) != len(ground_truths):
        raise MotipError(
            "some sequences name their classes and others do not",
            where=label_files[0].parents[2],
            found=f"{len(label_files)} labels.txt for {len(ground_truths)} gt.txt",
            fix="write the whole folder with one tool",
        )
    names = list(category_names)
    for file in label_files:
        stated = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if file != label_files[0] and stated != names:
            raise MotipError("sequences name their classes differently", where=file, found=stated, expected=names)
        names = stated
    numbers = {name: number for number, name in enumerate(config.class_names, start=1)}
    if label_files:
        for name, number in numbers.items():
            if names[number - 1 : number] != [name]:
                raise MotipError(
                    f"the class {name} has another number in the data",
                    where=label_files[0],
                    found=", ".join(f"{place} {label}" for place, label in enumerate(names, start=1)),
                    expected=f"{number} {name}",
                    fix="correct val_config.CLASS_NAME_TO_ID (or CLASSES)",
                )
    return {
        name: (names[number - 1] if number <= len(names) else f"class {number}",) for name, number in numbers.items()
    }
