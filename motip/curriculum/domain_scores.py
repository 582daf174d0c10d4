"""Scores of one model on the locked validation videos of several domains, stored beside its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from motip.config import Config, Curriculum
from motip.curriculum.stage import Session
from motip.data.manifest import Manifest, VideoEntry
from motip.data.sequence import ClassMap
from motip.evaluation.domain_matrix import subsample
from motip.evaluation.evaluator import EvalJob, ModelUnderTest, evaluate_videos, has_labels
from motip.evaluation.protocols import protocol_for
from motip.evaluation.scores import Scores
from motip.stage_folder import evaluation_folder
from motip.storage.atomic import digest
from motip.storage.paths import Location, read_json, write_json
from motip.tracking.settings import TrackerSettings
from motip.train.ray_train import device_from_config
from motip.weights.class_names import canonical_name

FORMAT = 1
"""Part of every row's identity; incremented when the meaning of a stored row changes."""
_PROGRESS_EVERY_S = 10.0


def scored_sources(curriculum: Curriculum) -> dict[str, list[str]]:
    """Domain -> its sources with a val split, in the order of the curriculum file."""
    found: dict[str, list[str]] = {}
    for name, source in curriculum.sources.items():
        if "val" in source.splits:
            found.setdefault(source.domain, []).append(name)
    return found


@dataclass(frozen=True)
class DomainSet:
    """The locked val videos of some domains, with class maps and protocols that do not depend on the model.

    Attributes:
        sources: domain -> its sources that have labels of the curriculum's classes.
        class_maps, protocols: by source. A source is scored on the curriculum's classes that it maps.
        unlabelled: domains without such a label.
    """

    sources: dict[str, tuple[str, ...]]
    videos: tuple[VideoEntry, ...]
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]
    unlabelled: tuple[str, ...]

    def identity(self) -> list[Any]:
        """Everything that scores depend on, except the model; JSON-able."""
        return [
            {domain: list(names) for domain, names in self.sources.items()},
            sorted([*video.identity, video.shard_sha256] for video in self.videos),
            {
                name: [list(each.names), {key: list(raws) for key, raws in each.mapping.items()}]
                for name, each in self.class_maps.items()
            },
            self.protocols,
        ]

    def missing_classes(self, classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Domain -> the classes it is scored on that a model with ``classes`` does not have."""
        own = {canonical_name(name) for name in classes}
        found = {
            domain: tuple(
                dict.fromkeys(
                    each for name in names for each in self.class_maps[name].names if canonical_name(each) not in own
                )
            )
            for domain, names in self.sources.items()
        }
        return {domain: names for domain, names in found.items() if names}


def domain_set(curriculum: Curriculum, manifest: Manifest, domains: Iterable[str]) -> DomainSet:
    """Videos, class maps and protocols for some domains; `domains.videos` of the curriculum subsamples each source."""
    classes = list(dict.fromkeys(name for stage in curriculum.stages for name in stage.config.class_names))
    listed = scored_sources(curriculum)
    wanted = set(domains)
    sources: dict[str, tuple[str, ...]] = {}
    videos: list[VideoEntry] = []
    class_maps: dict[str, ClassMap] = {}
    for domain in [name for name in listed if name in wanted]:
        kept = []
        for name in listed[domain]:
            mapping = {each: raws for each, raws in curriculum.sources[name].classes.items() if each in classes}
            class_map = ClassMap(tuple(each for each in classes if each in mapping), mapping)
            own = manifest.of(name, "val")
            if not has_labels(own, class_map):
                continue
            if curriculum.domains.videos is not None:
                own = subsample(own, curriculum.domains.videos, mapping, int(manifest.settings.get("seed", 0)))
            kept.append(name)
            class_maps[name] = class_map
            videos += own
        sources[domain] = tuple(kept)
    return DomainSet(
        sources={domain: names for domain, names in sources.items() if names},
        videos=tuple(videos),
        class_maps=class_maps,
        protocols={name: protocol_for(curriculum.sources[name], each.names) for name, each in class_maps.items()},
        unlabelled=tuple(domain for domain, names in sources.items() if not names),
    )


@dataclass(frozen=True)
class DomainScores:
    """One model's scores in several domains: a row of the domain matrix.

    Attributes:
        name: name of the stage, or of the base weights.
        inputs: digest of everything the scores depend on.
        classes: the model's classes.
        missing_classes: domain -> classes it is scored on that the model does not have; their scores are 0.
        settings: tracker settings.
        scores: domain -> source -> scores.
        tracked: videos tracked for this row; the tracks of the others were reused.
        reused: read from disk, not computed by this run.
    """

    name: str
    inputs: str
    sha256: str
    classes: tuple[str, ...]
    missing_classes: dict[str, tuple[str, ...]]
    settings: dict[str, Any]
    scores: dict[str, dict[str, Scores]]
    videos: int
    tracked: int
    seconds: float
    notes: tuple[str, ...] = ()
    reused: bool = False

    def save(self, path: Location) -> None:
        """Write the row as JSON; ``missing_classes`` is stored as ``lacking``, the key of version 0.1."""
        values = {key: value for key, value in self.__dict__.items() if key not in ("scores", "reused")}
        values["lacking"] = values.pop("missing_classes")
        write_json(path, {**values, "format": FORMAT, "scores": self.scores_json()})

    def scores_json(self) -> dict[str, dict[str, Any]]:
        """JSON-able scores by domain and source."""
        return {domain: {name: each.to_json() for name, each in own.items()} for domain, own in self.scores.items()}

    @classmethod
    def load(cls, path: Location, inputs: str) -> DomainScores | None:
        """The row stored at ``path`` if it has these inputs."""
        stored = read_json(path) if path.is_file() else {}
        if stored.get("format") != FORMAT or stored.get("inputs") != inputs:
            return None
        scores = {
            domain: {name: Scores.from_json(each) for name, each in own.items()}
            for domain, own in stored["scores"].items()
        }
        # version 0.1 also stored what of the row was in MLflow, which is ignored
        return _ROW.validate_python({**stored, "missing_classes": stored["lacking"], "scores": scores, "reused": True})


_ROW = TypeAdapter(DomainScores)


@dataclass(frozen=True)
class ScoredModel:
    """A model to score.

    Attributes:
        name: of its row.
        config: configuration of the stage that trained it, or that starts from it.
        sha256: digest of the weights file.
        load: loads the model; called only if the row is computed.
        named: its classes as given by the stage (PRETRAIN_CLASSES), None if the file names them. Part of the row's
            identity, since the digest of the file does not cover them.
    """

    name: str
    config: Config
    sha256: str
    load: Callable[[], ModelUnderTest]
    named: Sequence[str] | None = None


def score_domains(session: Session, scored: ScoredModel, domains: DomainSet, path: Location) -> DomainScores:
    """The row of a model: read from ``path`` if up to date, else tracked and scored; the caller saves it.

    Tracks share the folder of the evaluation job, so each video is tracked once for both.

    Raises:
        MotipError: weights or shards are missing or damaged, or files cannot be written.
    """
    name, named, settings = scored.name, scored.named, asdict(TrackerSettings.from_config(scored.config))
    # stored row
    inputs = digest([FORMAT, scored.sha256, settings, domains.identity(), *([] if named is None else [list(named)])])
    stored = DomainScores.load(path, inputs)
    if stored is not None:
        # JSON keys are sorted; restore the curriculum's order of domains.
        return replace(stored, name=name, scores={domain: stored.scores[domain] for domain in domains.sources})
    # new row
    begin = time.monotonic()
    model = scored.load()
    session.ui.note(f"{name}: scoring {len(domains.videos)} videos of {', '.join(domains.sources)}")
    work = EvalJob(
        videos=domains.videos,
        storage=session.options.storage,
        folder=evaluation_folder(session.options.storage, scored.sha256),
        split="val",
        cluster=session.cluster,
        device=_device(scored.config, session),
        on_video=_progress_notes(session, name),
    )
    done = evaluate_videos(model, work, domains.class_maps, domains.protocols)
    return DomainScores(
        name=name,
        inputs=inputs,
        sha256=scored.sha256,
        classes=model.classes,
        missing_classes=domains.missing_classes(model.classes),
        settings=asdict(model.settings),
        scores={domain: {each: done.scores[each] for each in own} for domain, own in domains.sources.items()},
        videos=done.videos,
        tracked=done.videos - done.reused,
        seconds=time.monotonic() - begin,
        notes=done.notes,
    )


def _device(config: Config, session: Session) -> str:
    if session.cluster is None:
        return str(device_from_config(config))
    return "cuda" if config.DEVICE != "cpu" and session.cluster.gpus >= 1 else "cpu"


def _progress_notes(session: Session, name: str) -> Callable[[VideoEntry, int, int], None]:
    """Notes the progress of the tracking every ``_PROGRESS_EVERY_S`` seconds."""
    last = time.monotonic()

    def on_video(video: VideoEntry, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_EVERY_S:
            last = time.monotonic()
            session.ui.note(f"{name}: tracked {done} of {total} videos, {video.source}/{video.video}")

    return on_video
