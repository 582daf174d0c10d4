"""Folders of stages, sweeps and evaluations: file names, typed records, locks. The only module that names these files.

A stage is a folder: ``events.jsonl`` records what happened, ``stage.json`` is its conclusion. Folders of version 0.1,
which have no event log, are read too.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from motip.errors import MotipError
from motip.events import EpochDone, Event, EventLog, Imported, Note, Scored, StepLogged, WeightsTransferred
from motip.storage.driver_process import driver_is_alive, this_driver
from motip.storage.paths import (
    Location,
    create_folder,
    exclusive_lock,
    files_under,
    location,
    read_json,
    recorded_file,
    sha256,
    write_json,
)

STAGE = "stage.json"
SWEEP = "sweep.json"
FORMAT = 1
"""Part of every stage's identity; incremented when the meaning of a stage's inputs or outputs changes."""


@dataclass(frozen=True)
class StageRecord:
    """A finished stage, as written to ``stage.json``; the next stage starts from its checkpoint.

    Attributes:
        skipped: found finished by this run, not trained by it.
    """

    stage: str
    inputs: str
    checkpoint: str
    sha256: str
    best_epoch: int
    step: int
    metrics: dict[str, float]
    run_id: str | None
    parent_sha256: str | None
    data_digest: str
    videos: int
    frames: int
    epochs: int
    seconds: float
    skipped: bool = False
    status: str = "finished"
    format: int = FORMAT
    transfer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobFacts:
    """Facts beside the configuration that evaluations of a stage need (``job.json``; version 0.1 may lack it).

    Attributes:
        best: metric that chooses the best checkpoint.
        classes: source -> {class name: raw categories}.
        protocols: source -> evaluation protocol.
        val: validation sources.
    """

    stage: str = ""
    best: str = "HOTA"
    classes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)
    val: list[str] = field(default_factory=list)


_RECORD = TypeAdapter(StageRecord)
_FACTS = TypeAdapter(JobFacts)


@dataclass(frozen=True)
class EpochCheckpoint:
    """A finished epoch: its metrics, and its weights while they are kept."""

    epoch: int
    step: int
    metrics: dict[str, float]
    weights: Location | None


@dataclass(frozen=True)
class CheckpointIndex:
    """Complete checkpoints in a stage's folder at the time of one listing."""

    epochs: list[EpochCheckpoint]
    """In order of the epoch."""
    steps: dict[int, Location]
    """Weights of the positions inside epochs by optimiser step, in order."""

    def latest(self) -> Location | None:
        """The newest complete checkpoint. At the same step a finished epoch precedes a position inside it."""
        found = [(step, 0, path) for step, path in self.steps.items()]
        found += [(each.step, 1, each.weights) for each in self.epochs if each.weights is not None]
        return max(found, key=lambda each: each[:2])[2] if found else None


class InUse(MotipError):
    """Another live process holds the lock of a stage or sweep.

    Attributes:
        parent_run_id: MLflow run of that process's curriculum.
    """

    parent_run_id = ""


class _LockedFolder:
    """A folder whose state file names the process that drives it, so that no second process writes to it."""

    kind = ""
    state_name = ""

    def __init__(self, path: Location | str) -> None:
        self.path = location(path)

    def __str__(self) -> str:
        return str(self.path)

    def log(self) -> EventLog:
        """The run's event log."""
        return EventLog(self.path)

    def exists(self) -> bool:
        """Whether this is such a folder."""
        return self.state_path.is_file()

    @property
    def state_path(self) -> Location:
        return self.path / self.state_name

    def state(self) -> dict[str, Any]:
        """The state file's values; empty if there is none."""
        return _optional_json(self.state_path)

    def run_id(self) -> str | None:
        """MLflow run of the newest attempt, so that interrupted and resumed attempts share one run."""
        found = self.state().get("run_id")
        return None if found is None else str(found)

    def acquire(self, parent_run_id: str = "") -> None:
        """Record this process as the driver.

        Args:
            parent_run_id: MLflow run of this process's curriculum.

        Raises:
            InUse: another process of this machine is the driver. Processes of other machines cannot be detected.
        """
        with self._exclusive():
            self._take(parent_run_id)

    def start(self, run_id: str, parent_run_id: str = "", **facts: Any) -> None:
        """Write the state of a running attempt; call `acquire` first."""
        running = {"status": "running", "run_id": run_id, **facts}
        write_json(self.state_path, {**running, "driver": this_driver(), "curriculum_run": parent_run_id})

    def release(self) -> None:
        """Give up the lock after a failure, so that other processes can take it while this one lives."""
        stored = self.state()
        if stored.get("driver") == this_driver():
            write_json(self.state_path, {key: value for key, value in stored.items() if key != "driver"})

    def _exclusive(self) -> contextlib.AbstractContextManager[None]:
        create_folder(self.path)
        return exclusive_lock(self.path / ".driver.lock", f"another start of this {self.kind}")

    def _take(self, parent_run_id: str) -> None:
        stored = self.state()
        driver = str(stored.get("driver", ""))
        if stored.get("status") == "running" and driver != this_driver() and driver_is_alive(driver):
            in_use = InUse(
                f"this {self.kind} is running already, with the same inputs",
                where=self.path,
                found=f"process {driver.split('/')[-2]} of this machine, which is alive",
                fix="wait for it or end it, then run the same command again; or use another --storage",
            )
            in_use.parent_run_id = str(stored.get("curriculum_run", ""))
            raise in_use
        owner = {"driver": this_driver(), "curriculum_run": parent_run_id}
        write_json(self.state_path, {**stored, "status": "running", **owner})


class StageFolder(_LockedFolder):
    """Files of a stage, or of a trial, which trains a stage."""

    kind = "stage"
    state_name = STAGE

    @property
    def name(self) -> str:
        """Name of the stage; version 0.1 did not always record it in an unfinished stage."""
        return str(self.facts().stage or self.state().get("stage") or self.path.parent.name)

    # ---- records

    def record(self) -> StageRecord | None:
        """The record of a finished stage, its checkpoint's address corrected if the storage was moved; else None.

        Raises:
            MotipError: the record is damaged.
        """
        stored = self.state()
        if stored.get("status") != "finished":
            return None
        try:
            record = _RECORD.validate_python(stored)
        except ValidationError as error:
            wrong = ", ".join(str(each["loc"][0]) for each in error.errors())
            raise MotipError(
                f"{STAGE} has no {wrong}",
                where=self.path,
                fix="delete it and run the curriculum again: finished epochs are not trained again",
            ) from error
        return replace(record, checkpoint=str(recorded_file(record.checkpoint, self.path)))

    def finished(self, inputs: str) -> StageRecord | None:
        """The record if the stage is finished with these inputs and its checkpoint is unchanged; else None."""
        stored = self.state()
        if stored.get("inputs") != inputs or stored.get("format") != FORMAT:
            return None
        record = self.record()
        if record is None:
            return None
        checkpoint = location(record.checkpoint)
        intact = checkpoint.is_file() and sha256(checkpoint) == record.sha256
        return replace(record, skipped=True) if intact else None

    def acquire_unless_finished(self, inputs: str, parent_run_id: str = "") -> StageRecord | None:
        """Like `acquire`; if another process has finished the stage meanwhile, returns its record and takes no lock."""
        with self._exclusive():
            done = self.finished(inputs)
            if done is None:
                self._take(parent_run_id)
            return done

    def write_record(self, record: StageRecord) -> None:
        """Write the record, which marks the stage as finished."""
        write_json(self.state_path, asdict(replace(record, skipped=False)))

    def not_in_mlflow(self) -> bool:
        """Whether version 0.1 was interrupted between finishing the stage and recording its result in MLflow."""
        stored = self.state()
        return stored.get("told", stored.get("mlflow_synced", True)) is False

    def write_job(self, config: Mapping[str, Any], facts: JobFacts) -> None:
        """Write ``config.json`` and ``job.json``."""
        write_json(self.path / "config.json", dict(config))
        write_json(self.path / "job.json", asdict(facts))

    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty if it was not written."""
        return _optional_json(self.path / "config.json")

    def facts(self) -> JobFacts:
        return _FACTS.validate_python(_optional_json(self.path / "job.json"))

    # ---- files derived from the event log

    @property
    def transfer(self) -> Location:
        return self.path / "transfer.json"

    @property
    def notes(self) -> Location:
        return self.path / "notes.txt"

    @property
    def dashboard(self) -> Location:
        return self.path / "dashboard.png"

    @property
    def failure(self) -> Location:
        return self.path / "failure.txt"

    @property
    def domains(self) -> Location:
        return self.path / "domains.json"

    def scores(self, epoch: int) -> Location:
        """Validation scores of a 0-based epoch."""
        return self.path / "scores" / f"epoch_{epoch:03d}.json"

    # ---- what happened

    def events(self) -> Iterator[Event]:
        """The event log; for a folder of version 0.1 the events that its files record, without their times."""
        log = self.log()
        return iter(log) if log.exists() else self._events_v0_1()

    def complete_log(self) -> None:
        """Add to the log the finished epochs it lacks: of version 0.1, or of a time when it could not be written."""
        log = self.log()
        if not log.exists() and (earlier := list(self._events_v0_1())):
            log.create([*earlier, Imported()])
        logged = {event.epoch for event in log if isinstance(event, EpochDone)}
        for each in self.checkpoints().epochs:
            if each.epoch not in logged:
                log.send(Note(f"metrics of epoch {each.epoch + 1} recorded only when the stage resumed", each.step))
                if self.scores(each.epoch).is_file():
                    log.send(Scored(each.epoch, each.step, read_json(self.scores(each.epoch))))
                log.send(EpochDone(each.epoch, each.step, each.metrics))
        log.close()

    def _events_v0_1(self) -> Iterator[Event]:
        """Notes, weight transfer, logged steps and epochs from notes.txt, transfer.json and history.json."""
        history = _optional_json(self.path / "history.json")
        if self.notes.is_file():
            for line in self.notes.read_text().splitlines():
                match = re.match(r"(?P<time>\S+?)(?: step (?P<step>\d+))?: (?P<text>.*)", line)
                if match:
                    when = datetime.fromisoformat(match["time"]).timestamp()
                    yield Note(match["text"], None if match["step"] is None else int(match["step"]), time=when)
        if self.transfer.is_file():
            yield WeightsTransferred(read_json(self.transfer), time=0.0)
        for epoch, done, values in history.get("steps", []):
            metrics = {f"step/{name}": value for name, value in values.items()}
            yield StepLogged(int(epoch), round(done * _STEPS_V0_1) - 1, _STEPS_V0_1, 0, metrics, time=0.0)
        for epoch, metrics in history.get("epochs", {}).items():
            yield EpochDone(int(epoch), 0, metrics, time=0.0)

    # ---- checkpoints

    @property
    def best(self) -> Location:
        return self.path / "checkpoint_best.pth"

    def checkpoints(self) -> CheckpointIndex:
        """The complete checkpoints.

        The metrics.json of an epoch is written after its weights; weights without it are incomplete and not listed.
        """
        files = {
            (path.parent.name, path.name): path for path in files_under(self.path) if path.parent.parent == self.path
        }
        epochs = []
        steps: dict[int, Location] = {}
        for (parent, name), path in files.items():
            if parent.startswith("epoch_") and name == METRICS:
                stored = read_json(path)
                number = int(stored["epoch"])
                weights = files.get((parent, epoch_file(number)))
                epochs.append(EpochCheckpoint(number, int(stored["step"]), stored["metrics"], weights))
            match = re.fullmatch(r"step_(\d+)", parent)
            if match and name == step_file(int(match[1])):
                steps[int(match[1])] = path
        return CheckpointIndex(sorted(epochs, key=lambda each: each.epoch), dict(sorted(steps.items())))


METRICS = "metrics.json"
_STEPS_V0_1 = 10**6
"""Steps of an epoch in events of version 0.1, which stored the fraction of the epoch only."""


def epoch_folder(epoch: int) -> str:
    return f"epoch_{epoch:03d}"


def epoch_file(epoch: int) -> str:
    return f"checkpoint_{epoch}.pth"


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def step_file(step: int) -> str:
    return f"checkpoint_step_{step}.pth"


def best_first(epochs: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
    """Epochs sorted by the metric, highest first, the earliest of equals first; epochs without a finite value are
    omitted."""
    values = {epoch: metrics.get(metric, math.nan) for epoch, metrics in epochs.items()}
    scored = [epoch for epoch, value in values.items() if math.isfinite(value)]
    return sorted(scored, key=lambda epoch: (-values[epoch], epoch))


class SweepFolder(_LockedFolder):
    """Files of a sweep: its state, one record per trial, and one stage folder per trial."""

    kind = "sweep"
    state_name = SWEEP

    def trial_record(self, key: str) -> Location:
        return self.path / "trials" / f"{key}.json"

    def trial(self, key: str, inputs: str) -> StageFolder:
        """Folder of a trial with these inputs."""
        return StageFolder(self.path / "trials" / f"{key}-{inputs[:12]}")

    def trial_records(self) -> list[Location]:
        """Record files of all trials, by key."""
        folder = self.path / "trials"
        return sorted(
            (path for path in files_under(folder) if path.parent == folder and path.suffix == ".json"), key=str
        )


def evaluation_folder(storage: str | Location, digest: str) -> Location:
    """Folder of the evaluations of one checkpoint, given by its hex sha256."""
    return location(storage) / "evaluations" / digest[:12]


def scores_file(split: str) -> str:
    """Name of the scores file in an evaluation folder."""
    return f"scores_{split}.json"


def stage_folders(folder: Location) -> Iterator[StageFolder]:
    """All stage folders below a folder, from one listing."""
    return (StageFolder(path.parent) for path in files_under(folder) if path.name == STAGE)


def _optional_json(path: Location) -> dict[str, Any]:
    """Content of a JSON file; empty if there is no such file."""
    return dict(read_json(path)) if path.is_file() else {}
