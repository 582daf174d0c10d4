"""Score one model on the locked videos of some domains, and keep the outcome beside its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from motip.config import Config, Curriculum
from motip.curriculum.domain_history import scored_sources
from motip.curriculum.stage import Session
from motip.curriculum.stage_inputs import protocol_for
from motip.data.manifest import Manifest, VideoEntry
from motip.data.sequence import ClassMap
from motip.evaluate.domain_matrix import thin
from motip.evaluate.evaluation import Subject, Work, evaluate, labelled
from motip.evaluate.scores import Scores
from motip.storage.atomic import digest
from motip.storage.paths import Location, location, read_json, write_json
from motip.track.settings import TrackerSettings
from motip.train.ray_train import pick_device
from motip.weights.class_names import canonical_name

FORMAT = 1
"""Part of every row's identity; raised when what a row holds comes to mean something else."""
TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class DomainSet:
    """The locked val videos of some domains, and the rules they are scored by whatever model it is.

    Attributes:
        sources: domain to its sources that have labels of the curriculum's classes.
        class_maps, protocols: by source. A source is scored on those classes of the curriculum that it maps.
        unlabelled: domains without a single such label.
    """

    sources: dict[str, tuple[str, ...]]
    videos: tuple[VideoEntry, ...]
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]
    unlabelled: tuple[str, ...]

    def identity(self) -> list[Any]:
        """All that scores on it follow from, beside the model."""
        return [
            {domain: list(names) for domain, names in self.sources.items()},
            sorted([*video.identity, video.shard_sha256] for video in self.videos),
            {name: [list(each.names), {key: list(raws) for key, raws in each.mapping.items()}]
             for name, each in self.class_maps.items()},
            self.protocols,
        ]  # fmt: skip

    def lacking(self, classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Domain to the classes it is scored on that a model with ``classes`` does not have."""
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
    """What is scored for some domains; `domains.videos` of the curriculum thins out each source."""
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
            if not labelled(own, class_map):
                continue
            if curriculum.domains.videos is not None:
                own = thin(own, curriculum.domains.videos, mapping, int(manifest.settings.get("seed", 0)))
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
class Row:
    """One model's scores in every domain it was scored in.

    Attributes:
        name: the stage, or the base weights.
        inputs: digest of all the scores follow from.
        classes: the model's own.
        lacking: domain to the classes it is scored on that the model does not have; they are missed, and count 0.
        settings: how it tracked.
        scores: domain -> source -> scores.
        tracked: videos that were tracked for it rather than found tracked.
        told: run id to the digest of what that run was told of this row.
    """

    name: str
    inputs: str
    sha256: str
    classes: tuple[str, ...]
    lacking: dict[str, tuple[str, ...]]
    settings: dict[str, Any]
    scores: dict[str, dict[str, Scores]]
    videos: int
    tracked: int
    seconds: float
    notes: tuple[str, ...] = ()
    told: dict[str, str] = field(default_factory=dict)
    reused: bool = False

    def save(self, path: Location) -> None:
        values = {key: value for key, value in self.__dict__.items() if key not in ("scores", "reused")}
        write_json(path, {**values, "format": FORMAT, "scores": self.scores_json()})

    def scores_json(self) -> dict[str, dict[str, Any]]:
        """Plain values, by domain and source."""
        return {domain: {name: each.to_json() for name, each in own.items()} for domain, own in self.scores.items()}

    @classmethod
    def load(cls, path: Location, inputs: str) -> Row | None:
        """The row kept at ``path``, if it has these inputs."""
        stored = read_json(path) if path.is_file() else {}
        if stored.get("format") != FORMAT or stored.get("inputs") != inputs:
            return None
        scores = {
            domain: {name: Scores.from_json(each) for name, each in own.items()}
            for domain, own in stored.pop("scores").items()
        }
        values = {key: value for key, value in stored.items() if key != "format"}
        values["classes"], values["notes"] = tuple(values["classes"]), tuple(values["notes"])
        values["lacking"] = {domain: tuple(names) for domain, names in values["lacking"].items()}
        return cls(**values, scores=scores, reused=True)


def scored_row(
    session: Session,
    name: str,
    config: Config,
    sha256: str,
    domains: DomainSet,
    path: Location,
    subject: Callable[[], Subject],
    named: Sequence[str] | None = None,
) -> Row:
    """The row of a model: as kept at ``path``, else tracked and scored; the caller saves it.

    Tracks lie where the evaluation job puts and looks for them, so each video is tracked once for both.

    Args:
        config: of the stage the model comes from, or goes into.
        sha256: of the weights file.
        subject: reads the model; called only where something is to be tracked or scored.
        named: the model's classes where the stage says them (PRETRAIN_CLASSES) and not the file: the file's digest does
            not know them.

    Raises:
        MotipError: weights or shards are missing or damaged, or files cannot be written.
    """
    settings = asdict(TrackerSettings.from_config(config))
    inputs = digest([FORMAT, sha256, settings, domains.identity(), *([] if named is None else [list(named)])])
    kept = Row.load(path, inputs)
    if kept is not None:
        # A file's keys are sorted; domains stand in the order of the curriculum.
        return replace(kept, name=name, scores={domain: kept.scores[domain] for domain in domains.sources})
    begin = time.monotonic()
    loaded = subject()
    session.ui.note(f"{name}: scoring {len(domains.videos)} videos of {', '.join(domains.sources)}")
    work = Work(
        videos=domains.videos,
        storage=session.options.storage,
        folder=location(session.options.storage) / "evaluations" / sha256[:12],
        split="val",
        cluster=session.cluster,
        device=_device(config, session),
        on_video=_Teller(session, name),
    )
    done = evaluate(loaded, work, domains.class_maps, domains.protocols)
    return Row(
        name=name,
        inputs=inputs,
        sha256=sha256,
        classes=loaded.classes,
        lacking=domains.lacking(loaded.classes),
        settings=asdict(loaded.settings),
        scores={domain: {each: done.scores[each] for each in own} for domain, own in domains.sources.items()},
        videos=done.videos,
        tracked=done.videos - done.reused,
        seconds=time.monotonic() - begin,
        notes=done.notes,
    )


def _device(config: Config, session: Session) -> str:
    if session.cluster is None:
        return str(pick_device(config))
    return "cuda" if config.DEVICE != "cpu" and session.cluster.gpus >= 1 else "cpu"


class _Teller:
    """Says how far the tracking is, every ten seconds."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._last = time.monotonic()

    def __call__(self, video: VideoEntry, done: int, total: int) -> None:
        if time.monotonic() - self._last >= TELL_EVERY_S:
            self._last = time.monotonic()
            self._session.ui.note(f"{self._name}: tracked {done} of {total} videos, {video.source}/{video.video}")
