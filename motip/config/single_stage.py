"""Single stage: a curriculum built from one stage's configuration, whose published keys name data and validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from motip.config.curriculum_file import (
    DEFAULT_CLASSES,
    DEFAULT_FPS,
    Curriculum,
    DatasetFormat,
    Domain,
    Domains,
    Mix,
    Source,
    Stage,
)
from motip.config.keys import Config
from motip.errors import MotipError

_VALIDATION = "validation"
"""Name of the source that val_config.GT_FOLDER becomes."""


class KnownDataset(NamedTuple):
    """A name allowed in DATASETS: its raw format, domain, and folder names."""

    format: DatasetFormat
    domain: Domain
    folders: tuple[str, ...]


KNOWN_DATASETS = {
    "BDD100K": KnownDataset("bdd100k", "ground", ("bdd100k", "BDD100K")),
    "VisDrone": KnownDataset("visdrone", "aerial", ("visdrone", "VisDrone")),
    "DanceTrack": KnownDataset("motchallenge", "dance", ("DanceTrack", "dancetrack")),
}


def single_stage(
    config: Config, data_root: str, category_names: Sequence[str], *, videos: int | None = None
) -> Curriculum:
    """Build the curriculum whose only stage is ``config``.

    Sources come from DATASETS, DATASET_SPLITS and DATASET_WEIGHTS, searched in DATA_ROOT under the data root and in
    the data root itself. The stage is validated on their ``val`` splits, or, if val_config.GT_FOLDER exists, on that
    folder alone (the sequences in SEQMAP_FILE). Weights are DETR_PRETRAIN's, or fresh if it is null.

    Args:
        data_root: folder of the raw datasets.
        category_names: the readers' names of class 1, 2, … of a gt.txt without a labels.txt.
        videos: training videos of each source, None for all.

    Raises:
        MotipError: an unknown dataset, lists of different lengths, a missing dataset or class.
    """
    # sources
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
        sources[_VALIDATION] = validation

    # stage
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.name).lstrip("_.-") or "stage"
    stage = Stage(name=name, config=config, data=tuple(mixes), val=None if validation is None else (_VALIDATION,))
    # No domain matrix: a single stage has no earlier domains to forget.
    return Curriculum(name=name, sources=sources, stages=(stage,), domains=Domains(score="none"))


def _search_roots(config: Config, data_root: str) -> list[Path]:
    if "://" in data_root:
        raise MotipError(
            "a single stage can only be trained from a local data root",
            where="--data-root",
            found=data_root,
            fix="mount the data, or define it in a curriculum file and run ray_jobs/curriculum.py",
        )
    root = Path(data_root).expanduser()
    inner = root / config.DATA_ROOT
    return [inner, root] if inner.is_dir() and inner.resolve() != root.resolve() else [root]


def _datasets(config: Config) -> list[tuple[str, str, float]]:
    """(dataset, training split, weight) for each entry of DATASETS."""
    # names
    names, where = config.DATASETS, f"DATASETS ({config.origin('DATASETS')})"
    folded = {name.lower(): name for name in KNOWN_DATASETS}
    unknown = [name for name in names if name.lower() not in folded]
    if unknown or not names:
        raise MotipError(
            f"unknown dataset {unknown[0]}" if unknown else "no dataset to train on",
            where=where,
            found=", ".join(names) or "an empty list",
            expected="some of " + ", ".join(KNOWN_DATASETS),
            fix="use a curriculum file for data in other formats or folders (see configs/curriculum.yaml)",
        )
    if len({name.lower() for name in names}) < len(names):
        raise MotipError("a dataset is listed twice", where=where, found=names)

    # splits and weights
    splits = config.DATASET_SPLITS * len(names) if len(config.DATASET_SPLITS) == 1 else config.DATASET_SPLITS
    weights = config.DATASET_WEIGHTS or (1.0,) * len(names)
    for key, values in (("DATASET_SPLITS", splits), ("DATASET_WEIGHTS", weights)):
        if len(values) != len(names):
            raise MotipError(
                f"{key} must have an entry for every dataset",
                where=f"{key} ({config.origin(key)})",
                found=f"{len(values)} entries",
                expected=f"{len(names)}, for {', '.join(names)}",
            )
    return [(folded[name.lower()], split, weight) for name, split, weight in zip(names, splits, weights, strict=True)]


def _source(
    name: str, splits: dict[str, str], config: Config, roots: Sequence[Path], category_names: Sequence[str]
) -> Source:
    # folder
    known = KNOWN_DATASETS[name]
    candidates = [root / folder for root in roots for folder in known.folders]
    root = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if root is None:
        raise MotipError(
            f"the dataset {name} was not found",
            where=f"DATASETS ({config.origin('DATASETS')}), --data-root",
            expected=" or ".join(map(str, candidates)),
            fix="move or link it there, or set --data-root to the folder that contains it",
        )

    # classes
    if known.format == "motchallenge":
        classes = _classes_by_number(config, [root / folder for folder in splits.values()], category_names)
    else:
        defaults = DEFAULT_CLASSES[known.format]
        classes = {label: defaults.get(label, (label,)) for label in config.class_names}
    return Source(
        name=name.lower(),
        format=known.format,
        root=str(root.resolve()),
        domain=known.domain,
        splits=splits,
        classes=classes,
        fps=DEFAULT_FPS.get(known.format),
    )


def _validation(config: Config, data_root: Path, category_names: Sequence[str]) -> Source | None:
    """GT_FOLDER as a source, if it exists."""
    named = config.val_config.GT_FOLDER
    if not named or not (data_root / named).is_dir():
        return None
    folder = (data_root / named).resolve()
    return Source(
        name=_VALIDATION,
        format="motchallenge",
        root=str(folder.parent),
        domain=KNOWN_DATASETS[_datasets(config)[0][0]].domain,
        splits={"val": folder.name},
        sequences=_validation_sequences(config, data_root),
        classes=_classes_by_number(config, [folder], category_names),
    )


def _validation_sequences(config: Config, data_root: Path) -> dict[str, tuple[str, ...]]:
    """The validation sequences listed in SEQMAP_FILE, if it exists."""
    named = config.val_config.SEQMAP_FILE
    if not named or not (data_root / named).is_file():
        return {}
    lines = [line.strip() for line in (data_root / named).read_text().splitlines() if line.strip()]
    names = tuple(lines[1:] if lines[:1] == ["name"] else lines)
    if not names:
        raise MotipError("the sequence map lists no sequence", where=data_root / named, expected="one name per line")
    return {"val": names}


def _classes_by_number(
    config: Config, folders: Sequence[Path], category_names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Class to the reader's category for its number in gt.txt; the numbers are those of CLASS_NAME_TO_ID."""
    # category names by number
    label_files = [file for folder in folders for file in sorted(folder.glob("*/gt/labels.txt"))]
    ground_truths = [file for folder in folders for file in folder.glob("*/gt/gt.txt")]
    if label_files and len(label_files) != len(ground_truths):
        raise MotipError(
            "only some sequences have a labels.txt",
            where=label_files[0].parents[2],
            found=f"{len(label_files)} labels.txt for {len(ground_truths)} gt.txt",
            fix="write all sequences of the folder with the same tool",
        )
    names = list(category_names)
    for file in label_files:
        stated = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if file != label_files[0] and stated != names:
            raise MotipError("sequences have different class names", where=file, found=stated, expected=names)
        names = stated

    # numbers of the configuration
    numbers = {name: number for number, name in enumerate(config.class_names, start=1)}
    if label_files:
        for name, number in numbers.items():
            if names[number - 1 : number] != [name]:
                raise MotipError(
                    f"the class {name} has another number in the data",
                    where=label_files[0],
                    found=", ".join(f"{position} {label}" for position, label in enumerate(names, start=1)),
                    expected=f"{number} {name}",
                    fix="correct val_config.CLASS_NAME_TO_ID (or CLASSES)",
                )
    return {
        name: (names[number - 1] if number <= len(names) else f"class {number}",) for name, number in numbers.items()
    }
