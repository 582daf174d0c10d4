"""Score files of evaluations and stages: find and read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from motip.errors import MotipError
from motip.evaluation.scores import Scores
from motip.stage_folder import STAGE, StageFolder, scores_file
from motip.storage.paths import Location, location

_EPOCH = re.compile(r"epoch_(\d+)\.json")
_EXPECTED = (
    "a scores file, a folder of evaluations/, a stage's folder or its scores/ folder, or the MLflow id of a stage's run"
)


def load_scores(place: str, split: str = "val") -> tuple[str, dict[str, Scores]]:
    """Scores by source, and the file they were read from.

    Args:
        place: path of a scores file or of a folder with one (of a stage: that of its best epoch).
        split: selects the file in an evaluation folder.

    Raises:
        MotipError: the path does not exist, is ambiguous, or does not contain scores.
    """
    path = location(place)
    if not path.exists():
        raise MotipError("no scores found", where=place, found="no such file or folder", expected=_EXPECTED)
    if path.is_dir():
        path = _file_in(path, split)
    return str(path), read_scores(_json(path), str(path))


def read_scores(stored: Any, where: str) -> dict[str, Scores]:
    """Scores by source from the JSON of an evaluation, an epoch, or a row of the stage-by-domain matrix.

    Args:
        stored: the parsed JSON.
        where: path for error messages.

    Raises:
        MotipError: the JSON does not contain scores.
    """
    try:
        by_source = stored.get("sources", stored)
        if by_source is stored and "scores" in stored:
            by_source = {source: each for own in stored["scores"].values() for source, each in own.items()}
        scores = {source: Scores.from_json(each) for source, each in by_source.items()}
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise MotipError(
            "this file does not contain scores",
            where=where,
            found=f"other JSON ({type(error).__name__}: {error})",
            expected="a scores file written by motip evaluate or by a stage",
        ) from error
    if not scores:
        raise MotipError(
            "this file contains no source",
            where=where,
            expected="at least one source with labels",
            fix="evaluate on a split that has labels",
        )
    return scores


def best_of(epochs: Mapping[int, Mapping[str, Scores]], best: Mapping[str, float], where: str) -> int:
    """The epoch whose scores equal the metrics of the stage's best checkpoint.

    Args:
        epochs: 0-based epoch -> source -> scores.
        best: metrics of the best checkpoint, by the names of ``StageScores.flat``.

    Raises:
        MotipError: there is none.
    """
    from motip.evaluation.validation import StageScores

    for epoch, scores in sorted(epochs.items()):
        flat = StageScores(dict(scores)).flat()
        shared = [name for name in flat if name in best]
        if shared and all(abs(flat[name] - best[name]) <= 1e-9 * max(1.0, abs(flat[name])) for name in shared):
            return epoch
    raise MotipError(
        "no epoch of this run has the metrics of its best checkpoint",
        where=where,
        found=f"{len(epochs)} scored epochs; the run {'is not finished' if not best else 'has other metrics'}",
        fix="wait until the stage is finished, or name one of its scores files",
    )


def epoch_of(name: str) -> int | None:
    """The 0-based epoch in the name ``epoch_<n>.json``, None for other names."""
    match = _EPOCH.fullmatch(name)
    return int(match[1]) if match else None


def _file_in(folder: Location, split: str) -> Location:
    """The scores file of an evaluation, stage or scores folder."""
    evaluation = folder / scores_file(split)
    if evaluation.is_file():
        return evaluation
    # stage folder, its scores/, or a folder with a single stage
    if StageFolder(folder).exists():
        return _best_file(StageFolder(folder))
    if folder.name == "scores" and StageFolder(folder.parent).exists():
        return _best_file(StageFolder(folder.parent))
    inner = [StageFolder(each) for each in folder.iterdir() if each.is_dir() and StageFolder(each).exists()]
    if len(inner) == 1:
        return _best_file(inner[0])
    # folder with a single epoch
    files = sorted(each.name for each in folder.iterdir() if each.name.endswith(".json"))
    if len(files) == 1 and epoch_of(files[0]) is not None:
        return folder / files[0]
    raise MotipError(
        "this folder does not contain exactly one scores file",
        where=folder,
        found=", ".join(sorted(map(str, inner)) or files) or "no scores",
        expected=f"{scores_file(split)}, or the {STAGE} of a finished stage",
        fix="name one of the files" if inner or files else f"name {_EXPECTED}",
    )


def _best_file(stage: StageFolder) -> Location:
    epoch = stage.state().get("best_epoch")
    if epoch is None:
        raise MotipError(
            "this stage is not finished, so it has no best epoch yet",
            where=stage.path,
            fix=f"name one of its files, such as {stage.scores(0)}",
        )
    path = stage.scores(int(epoch))
    if not path.is_file():
        raise MotipError("the scores of the stage's best epoch are missing", where=path, fix="evaluate its checkpoint")
    return path


def _json(path: Location) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise MotipError(f"not a JSON file: {error}", where=path, expected=_EXPECTED) from error
