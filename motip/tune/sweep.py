"""A sweep over one stage: trials as child runs of one MLflow run, the winner confirmed, the result as an overlay."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motip.cluster import Cluster
from motip.config import Stage
from motip.config.curriculum_file import tuned_file
from motip.config.sweep_file import SweepFile, check_sweep, hand_set
from motip.config.tuned import overlay_text
from motip.config.yaml_chain import with_values
from motip.curriculum.failure import beside_a_failure, tell_failure
from motip.curriculum.records import claim, release
from motip.curriculum.stage import Session, Ui
from motip.curriculum.stage_inputs import SPEED_ONLY, stage_job
from motip.data.manifest import entries_digest
from motip.errors import MotipError
from motip.lineage.driver_process import this_driver
from motip.lineage.provenance import provenance
from motip.storage.atomic import digest
from motip.storage.paths import Location, files_under, location, put, write_bytes, write_json
from motip.train.stage_job import EpochPlans, Parent, StageJob
from motip.tune.decision import Verdict, evidence, favourite, judge, setting_text
from motip.tune.ray_tune import Room, room, search
from motip.tune.searcher import Ask, Told, suggest
from motip.tune.sweep_plot import Shown, sweep_figure
from motip.tune.sweep_records import HAND_SET, read_trial, read_trials, repeat_key, trial_key, write_trial
from motip.tune.trial import TrialRunner, drop_weights

_log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every sweep's identity; raised when the meaning of what is searched changes."""


@dataclass(frozen=True)
class Tuning:
    """How sweeps are run.

    Attributes:
        workers: training workers of each trial.
        trials: settings that are tried; None for the sweep file's number.
        at_once: trials that must run side by side; None for as many as fit.
        overlay: file that the values found are written to; None for a place by the stage's name.
    """

    workers: int = 1
    trials: int | None = None
    at_once: int | None = None
    overlay: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep produced.

    Attributes:
        values: what goes on top of the stage's configuration; empty where the hand-set values stay.
        overlay: the file that holds them.
    """

    stage: str
    metric: str
    verdict: Verdict
    values: dict[str, Any]
    trials: tuple[Told, ...]
    repeats: tuple[Told, ...]
    folder: Location
    overlay: Location
    picture: Location
    run_id: str

    def summary(self) -> str:
        """The last line of a sweep."""
        best, own = self.verdict.best, self.verdict.hand_set
        if not self.values:
            found = f"the hand-set values stay ({self.metric} {own.mean:.2f}; best trial {best.key} {best.mean:.2f})"
        else:
            found = f"{setting_text(self.values)}: {self.metric} {best.mean:.2f}, hand-set {own.mean:.2f}"
        return f"tuned {self.stage}: {found}; values: {self.overlay}; picture: {self.picture}"


def tune_stage(session: Session, stage: Stage, parent: Parent | None, tuning: Tuning) -> SweepResult:
    """Search the values that the stage's sweep file names, or go on with a search that was cut off.

    Raises:
        MotipError: the sweep does not fit the stage or the cluster, or no trial came to its end.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    sweep, at_once = check_tuning(stage, tuning, session.cluster)
    base = stage.model_copy(
        update={
            "config": with_values(stage.config, sweep.set, "set: of the sweep file"),
            "best": sweep.metric or stage.best,
        }
    )
    job, train = stage_job(session.curriculum, base, parent, session.manifest, session.options)
    EpochPlans(job, base.config, tuning.workers)(0)  # no trainable clip is said now, not by every trial
    identity = _identity(job, sweep, tuning.workers)
    folder = _folder(session, stage, identity)
    data = entries_digest([*train, *job.val])
    with _driven(session, stage, sweep, identity, data, folder) as run_id:
        runner = TrialRunner(
            session.curriculum,
            base,
            parent,
            session.manifest,
            session.options,
            session.lineage,
            run_id,
            str(folder),
            at_once.placement,
        )
        hand = hand_set(base.config, sweep.space)
        asked = tuning.trials or sweep.trials
        session.ui.note(
            f"{stage.name}: sweep over {', '.join(sweep.space)}; {asked} trials of {tuning.workers} "
            f"worker{'s' if tuning.workers != 1 else ''} each; {at_once.sentence}; into {folder}"
        )
        trials = _search(session, sweep, hand, asked, runner, at_once, folder)
        repeats = _confirm(session, sweep, base.config.SEED, trials, runner, at_once, folder)
        verdict = judge(trials, repeats, base.config.SEED)
        lines = evidence(
            verdict,
            trials,
            sweep,
            stage=stage.name,
            metric=base.best,
            videos=len(job.val),
            hand_set=hand,
            digests={"sweep": identity, "data": data, "code": _commit()},
        )
        overlay = _overlay_place(session, stage, tuning)
        text = overlay_text(verdict.chosen, lines)
        write_bytes(overlay, text.encode())
        write_bytes(folder / "tuned.yaml", text.encode())
        picture = _picture(session, stage, base.best, sweep, hand, trials, repeats, verdict, folder, run_id)
        result = SweepResult(
            stage.name,
            base.best,
            verdict,
            verdict.chosen,
            tuple(trials),
            tuple(repeats),
            folder,
            overlay,
            picture,
            run_id,
        )
        _record(session, result, hand, text)
    _drop_others(folder, verdict.best.key)
    return result


def check_tuning(stage: Stage, tuning: Tuning, cluster: Cluster | None) -> tuple[SweepFile, Room]:
    """What is refused before anything is trained or converted: a sweep that fits neither stage nor cluster.

    Raises:
        MotipError: so it is, with the arithmetic.
    """
    sweep = stage.sweep
    if sweep is None or cluster is None:
        raise MotipError(
            "a sweep needs a sweep file and Ray workers",
            where=f"stage {stage.name}",
            fix="give the stage a line `sweep: FILE`, and --workers-per-trial 1 or more",
        )
    check_sweep(sweep, stage.config, f"sweep of stage {stage.name}")
    useless = sorted(set(sweep.space) & SPEED_ONLY)
    if useless:
        raise MotipError(
            f"{useless[0]} cannot be searched: it changes speed or places, not the result",
            where=f"sweep of stage {stage.name}",
        )
    config = with_values(stage.config, sweep.set, "set: of the sweep file")
    return sweep, room(tuning.workers, config, cluster, tuning.at_once)


def _identity(job: StageJob, sweep: SweepFile, workers: int) -> str:
    """Names what its trials have in common; more trials or further seeds belong to the same sweep."""
    how = sweep.model_dump(mode="json", include={"search", "seed", "startup", "space", "prune"})
    return digest({"format": FORMAT, "stage": job.inputs, "sweep": how, "workers": workers})


def _folder(session: Session, stage: Stage, identity: str) -> Location:
    storage = location(session.options.storage)
    storage = storage.resolve() if isinstance(storage, Path) else storage
    return storage / "sweeps" / session.curriculum.name / stage.name / identity[:12]


def _start_run(session: Session, stage: Stage, sweep: SweepFile, identity: str, data: str) -> str:
    above = {"mlflow.parentRunId": session.run_id} if session.run_id else {}
    return session.lineage.start_curriculum(
        f"{stage.name} sweep",
        {"identity": identity, "stage": stage.name, "sweep": sweep.model_dump(mode="json")},
        {**above, "motip.stage": stage.name, "motip.data.sha256": data, "motip.config": session.options.config_path},
        reopen_finished=True,
        kind="sweep",
    )


@contextlib.contextmanager
def _driven(
    session: Session, stage: Stage, sweep: SweepFile, identity: str, data: str, folder: Location
) -> Iterator[str]:
    """The sweep in the hands of this process, as its MLflow run; whatever fails in here ends the run."""
    claim(folder / "sweep.json", "sweep", under=session.run_id)
    try:
        run_id = _start_run(session, stage, sweep, identity, data)
        try:
            running = {"status": "running", "identity": identity, "run_id": run_id}
            driven = {"driver": this_driver(), "curriculum_run": session.run_id}
            write_json(folder / "sweep.json", {**running, **driven})
            yield run_id
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _mark_cut_off(session, folder, error)
            tell_failure(session.lineage, run_id, error)
            raise
    except BaseException:
        with beside_a_failure(f"{folder} stays in use by this process while it lives"):
            release(folder / "sweep.json")
        raise


# ------------------------------------------------------------------------------------------------ the two searches


def _search(
    session: Session,
    sweep: SweepFile,
    hand: dict[str, Any],
    asked: int,
    runner: TrialRunner,
    at_once: Room,
    folder: Location,
) -> list[Told]:
    """The hand-set setting and what the search suggests, up to the number asked for."""
    written = [told for told in read_trials(folder) if told.ask.seed is None]
    # Without the hand-set trial nothing can be judged, so it is tried again where it failed.
    again = [t.ask for t in written if t.status == "running" or (t.ask.key == HAND_SET and t.status == "failed")]
    known = [told for told in written if told.ask not in again]
    if written:
        session.ui.note(f"going on with an earlier run: {len(known)} trials ended, {len(again)} were cut off")

    def source(all_: Sequence[Told]) -> Ask | None:
        if any(told.ask.key == HAND_SET and told.status == "failed" for told in all_):
            return None
        if again:
            return again.pop(0)
        if len(all_) >= asked:
            return None
        if not all_:
            return Ask(HAND_SET, {})
        number = 1 + max(int(told.ask.key) for told in all_)
        values = suggest(sweep, hand, all_, number)
        if values is None:
            session.ui.note(f"all {len(all_)} settings of the space are tried; there are no more")
            return None
        return Ask(trial_key(number), values)

    longest = max((runner.stage.config.EPOCHS, *map(int, _searched_epochs(sweep))))
    watch = _Watch(session.ui, folder, asked, len(known))
    trials = search(source, runner, at_once, watch, known=known, prune=sweep.prune, longest=longest)
    first = next(told for told in trials if told.ask.key == HAND_SET)
    if first.status == "failed":
        raise MotipError(
            f"the hand-set setting itself cannot be trained: {first.message}",
            where=f"trial {HAND_SET} in {folder}",
            fix="train the stage without a sweep first (ray_jobs/train.py), then run the same command again",
        )
    return sorted(trials, key=lambda told: told.ask.key)


def _confirm(
    session: Session,
    sweep: SweepFile,
    seed: int,
    trials: Sequence[Told],
    runner: TrialRunner,
    at_once: Room,
    folder: Location,
) -> list[Told]:
    """The favourite, and where wanted the hand-set setting, with further seeds and without pruning."""
    best = favourite(trials)
    settings = {best.ask.key: best.ask.values}
    if sweep.confirm.hand_set or best.ask.key == HAND_SET:
        settings[HAND_SET] = {}
    seeds = range(seed + 1, seed + 1 + sweep.confirm.seeds)
    wanted = [Ask(repeat_key(key, each), values, each) for each in seeds for key, values in settings.items()]
    written = {told.ask.key: told for told in read_trials(folder) if told.status == "finished"}
    known = [written[ask.key] for ask in wanted if ask.key in written]
    missing = [ask for ask in wanted if ask.key not in written]
    if missing:
        session.ui.note(
            f"trial {best.ask.key} is best so far, {best.value:.2f}; trained again with seeds "
            f"{', '.join(map(str, seeds))}{', as the hand-set setting is' if len(settings) > 1 else ''}"
        )
    watch = _Watch(session.ui, folder, len(wanted), len(known))
    return search(lambda _: missing.pop(0) if missing else None, runner, at_once, watch, known=known)


class _Watch:
    """Says what happens, and writes down what was asked for, so that it is asked again after a kill."""

    def __init__(self, ui: Ui, folder: Location, asked: int, ended: int) -> None:
        self._ui, self._folder, self._asked, self._ended = ui, folder, asked, ended

    def asked(self, told: Told) -> None:
        earlier = read_trial(self._folder, told.ask.key)
        if not earlier:
            write_trial(self._folder, told)
        seed = "" if told.ask.seed is None else f", seed {told.ask.seed}"
        verb = "goes on" if earlier.get("run_id") else "starts"
        self._ui.note(f"trial {told.ask.key} {verb}: {setting_text(told.ask.values)}{seed}")

    def ended(self, told: Told) -> None:
        self._ended += 1
        after = max(told.history, default=0)
        epochs = f"{after} epoch{'s' if after != 1 else ''}"
        how = {
            "finished": f"finished after {epochs}",
            "pruned": f"pruned after {epochs}: others were better by then",
            "failed": f"failed: {told.message}",
        }.get(told.status, told.status)
        value = "" if told.value is None else f", best {told.value:.2f}"
        self._ui.note(f"trial {told.ask.key} {how}{value} ({self._ended} of {self._asked} done)")

    def said(self, text: str) -> None:
        self._ui.note(text)

    def progress(self, known: Sequence[Told], running: dict[str, str]) -> None:
        best = max((told for told in known if told.value is not None), key=lambda told: told.value or 0, default=None)
        where = "; ".join(f"trial {key} at {position}" for key, position in sorted(running.items()))
        so_far = "" if best is None else f"; best so far trial {best.ask.key}, {best.value:.2f}"
        self._ui.note(f"{self._ended} of {self._asked} done; {where or 'workers are starting'}{so_far}")


def _searched_epochs(sweep: SweepFile) -> tuple[Any, ...]:
    searched = sweep.space.get("EPOCHS")
    return () if searched is None else tuple(searched.ends())


def _mark_cut_off(session: Session, folder: Location, error: KeyboardInterrupt) -> None:
    """The trials, in MLflow; their records stay `running`, which is what makes them go on."""
    with beside_a_failure("the trials that were cut off could not be marked so"):
        for told in read_trials(folder):
            own = read_trial(folder, told.ask.key).get("run_id")
            if told.status == "running" and own:
                tell_failure(session.lineage, own, error)


# ------------------------------------------------------------------------------------------------ the result


def _overlay_place(session: Session, stage: Stage, tuning: Tuning) -> Location:
    """Where the values go: as asked for, where the stage looks for them, or configs/tuned/ by the stage's name.

    A submitted job's working directory is thrown away, so there relative places lie under the storage.
    """
    own = (
        f"{stage.name}.yaml"
        if session.curriculum.name == stage.name
        else f"{session.curriculum.name}/{stage.name}.yaml"
    )
    named = Path(tuning.overlay or stage.tuned or f"configs/tuned/{own}").expanduser()
    if named.is_absolute():
        return named
    if "working_dir_files" in Path.cwd().parts:
        return location(session.options.storage) / str(named)
    if tuning.overlay is None and stage.tuned:
        return tuned_file(stage.tuned, Path(session.options.config_path)).resolve()
    return Path.cwd() / named


def _picture(
    session: Session,
    stage: Stage,
    metric: str,
    sweep: SweepFile,
    hand: dict[str, Any],
    trials: Sequence[Told],
    repeats: Sequence[Told],
    verdict: Verdict,
    folder: Location,
    run_id: str,
) -> Location:
    shown = [
        Shown(
            key=told.ask.key,
            values={**hand, **told.ask.values},
            value=told.value,
            status=told.status,
            repeats=tuple(
                each.value
                for each in repeats
                if each.value is not None and each.ask.key.startswith(f"{told.ask.key}-seed")
            ),
        )
        for told in trials
    ]
    figure = sweep_figure(
        shown, sweep.space, title=f"{stage.name}, sweep", metric=metric, hand_set=HAND_SET, best=verdict.best.key
    )
    with tempfile.TemporaryDirectory(prefix="motip-") as place:
        file = Path(place) / "sweep.png"
        figure.savefig(file, dpi=110)
        put(file, folder / "sweep.png")
        session.lineage.log_artifact(run_id, file)
    return folder / "sweep.png"


def _record(session: Session, result: SweepResult, hand: dict[str, Any], text: str) -> None:
    lineage, run_id, verdict = session.lineage, result.run_id, result.verdict
    header = ["trial", "status", *hand, "seed", "epochs", result.metric, "run"]
    rows = []
    for told in (*result.trials, *result.repeats):
        record = read_trial(result.folder, told.ask.key)
        values = [(hand | told.ask.values)[key] for key in hand]
        rows.append(
            [
                *(told.ask.key, told.status, *values, told.ask.seed or verdict.best.seed),
                *(max(told.history, default=0), told.value, record.get("run_id", "")),
            ]
        )
    lineage.log_table(run_id, header, rows, "trials.json")
    lineage.log_text(run_id, text, "tuned.yaml")
    best_so_far = 0.0
    for number, told in enumerate(result.trials):
        if told.value is not None:
            best_so_far = max(best_so_far, told.value)
            lineage.log_metrics(run_id, {"trial": told.value, "best_so_far": best_so_far}, number)
    counts = Counter(told.status for told in result.trials)
    lineage.log_metrics(
        run_id,
        {
            f"best_{result.metric}": verdict.best.mean,
            f"hand_set_{result.metric}": verdict.hand_set.mean,
            **{f"trials_{status}": float(counts[status]) for status in ("finished", "pruned", "failed")},
        },
        len(result.trials),
    )
    lineage.set_tags(run_id, {"motip.sweep.result": result.summary()})
    lineage.finish(run_id, "FINISHED")
    write_json(
        result.folder / "sweep.json",
        {
            "status": "finished",
            "run_id": run_id,
            "best": verdict.best.key,
            "values": result.values,
            "better": verdict.better,
            "overlay": str(result.overlay),
        },
    )


def _drop_others(folder: Location, best: str) -> None:
    """The winner's weights stay; those of the others were needed only until they were scored."""
    for path in sorted({file.parent.parent for file in _weights(folder)}, key=str):
        if not path.name.startswith(f"{best}-") or path.name.startswith(f"{best}-seed"):
            drop_weights(path)


def _weights(folder: Location) -> list[Location]:
    return [path for path in files_under(folder / "trials") if path.name.endswith(".pth")]


def _commit() -> str:
    git = provenance()["git"]
    return f"{git['commit'] or 'unknown'}{' with changes' if git['dirty'] else ''}"
