"""Record a curriculum: one parent run, one child per stage, what went in and what came out."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import tempfile
import time
import urllib.parse
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError
from motip.lineage import chain as lineage_walk
from motip.lineage.delivery import ATTACHED, BATCH_METRICS, batch_of, hand_over, hand_over_points, refusal_of_all
from motip.lineage.driver_process import driven_elsewhere, this_driver
from motip.lineage.provenance import provenance, redact
from motip.lineage.record_file import as_text, read_record, record_text
from motip.lineage.recorded_scores import RunScores, read_scores
from motip.lineage.registered_model import find_run, latest_model
from motip.lineage.spool import Entry, Spool
from motip.lineage.steps import DataUsed, LineageStep, provenance_tags
from motip.lineage.store import Store, Unreachable
from motip.lineage.tags import Tag, join_params, split_params
from motip.lineage.verify import FileCheck, verify
from motip.storage.atomic import digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BATCH_PARAMS = 100
END_STATES = ("FINISHED", "FAILED", "KILLED")


class Lineage:
    """Everything the curriculum tells MLflow. Run ids are explicit, so that driver and workers can both write.

    Starting a run needs the server. Whatever is told about a started run is kept in a spool under
    ``storage/mlflow/spool`` while the server is away and delivered later with its own steps and times, in order.

    Args:
        tracking_uri: address of MLflow; None takes MLFLOW_TRACKING_URI, else SQLite under ``storage``.
        storage: folder for database, artifacts and spool (``mlflow/`` under it).
        experiment: name of the MLflow experiment.
        patience: seconds that starting a run waits for a server that is away.
        rest: seconds without a new try after the server was found to be away.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        storage: Path | str = "~/motip",
        experiment: str = "motip-curriculum",
        *,
        patience: float = 120.0,
        rest: float = 15.0,
    ) -> None:
        self._store = Store(tracking_uri, storage, experiment)
        self._shards = storage
        self._spool = Spool(self._store.folder / "spool")
        self._patience, self._rest = patience, rest
        self._away_until = 0.0
        self._guest_of: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The clock that the rest is measured with starts anew on another machine.
        self.__dict__.update(state, _away_until=0.0)

    @property
    def tracking_uri(self) -> str:
        """The address in use, always absolute; may hold credentials, so show ``shown_uri`` instead."""
        return self._store.uri

    @property
    def shown_uri(self) -> str:
        return self._store.shown_uri

    # ---- runs ----------------------------------------------------------------------------------------------------

    def start_curriculum(
        self,
        name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        *,
        reopen_finished: bool = False,
        kind: str = "curriculum",
    ) -> str:
        """The parent run of a curriculum: a new one, or the unfinished one of the same name and config.

        Stages of that one that still count as running were cut off and are marked so, unless another process of this
        host that lives drives them. The parent run of such a process is left as it is, and its end to that process.

        Args:
            reopen_finished: continue a finished run of the same inputs too, instead of starting another.
            kind: what the run is the parent of; `sweep` for that of trials.

        Raises:
            MotipError: the server does not answer within the patience, or refuses.
        """
        inputs = digest([name, redact(config)])
        # First of all: what waits has to find its place too.
        self._store.patiently(self._store.follow, self._patience)
        self.flush()

        def start() -> str:
            client = self._store.client()
            earlier = self._find_runs(f"tags.`{Tag.INPUTS}` = '{inputs}' and tags.`{Tag.KIND}` = '{kind}'")
            for run in earlier:
                if run.info.status == "FINISHED" and not reopen_finished:
                    continue
                for child in self._find_runs(f"tags.`{Tag.PARENT_RUN}` = '{run.info.run_id}'"):
                    if child.info.status == "RUNNING" and not driven_elsewhere(child):
                        self.mark_interrupted(child.info.run_id)
                if driven_elsewhere(run):
                    # Stages of both may go under it, but it begins and ends with the process that has it.
                    self._guest_of.add(run.info.run_id)
                else:
                    self._reopen(run.info.run_id)
                return str(run.info.run_id)
            created = client.create_run(
                self._store.experiment_id,
                run_name=name,
                tags={
                    Tag.KIND: kind,
                    Tag.CURRICULUM: name,
                    Tag.INPUTS: inputs,
                    Tag.DRIVER: this_driver(),
                    **_clean(tags),
                },
            )
            return str(created.info.run_id)

        run_id = self._store.patiently(start, self._patience)
        self.log_dict(run_id, config, f"{kind}.json")
        return run_id

    def start_stage(
        self,
        parent_run_id: str,
        stage: str,
        config: Mapping[str, Any],
        data_digest: str,
        parent_checkpoint: Mapping[str, str | None] | None,
        resume_run_id: str | None = None,
        *,
        datasets: SequenceOf[DataUsed] = (),
        tags: Mapping[str, str] | None = None,
        free: Collection[str] = (),
    ) -> str:
        """The run of one stage: exactly one, however often it is interrupted and started again.

        Args:
            parent_run_id: of the curriculum.
            config: resolved configuration, names as in the YAML; logged as ``config.json`` and, without names that
                begin with an underscore (they stand in no YAML), as parameters.
            data_digest: hex sha256 over everything the stage reads.
            parent_checkpoint: ``{"path", "sha256", "run_id"}`` of the weights it starts from (run_id may be None for
                weights that no run made: the chain then goes on with the record beside them); None for a start from
                scratch.
            resume_run_id: continue this run; without it, or where MLflow does not have it any more, an unfinished run
                of the same stage and inputs is looked for.
            datasets: what the data consists of, for MLflow's dataset inputs; by default one entry.
            free: names of the configuration that change neither results nor inputs: a run goes on with other values
                of these. Its parameters stay what they were; the tag of the resume names the difference.

        Raises:
            MotipError: the server does not answer within the patience, a resumed run was started with other
                parameters that are not free, or the record beside the weights is of another file.
        """
        config = redact(config)
        parent = dict(parent_checkpoint or {})
        fixed = {key: value for key, value in config.items() if key not in free}
        inputs = digest([stage, fixed, data_digest, parent.get("sha256")])
        told = [] if parent.get("run_id") or not parent else read_record(parent["path"] or "", parent["sha256"] or "")

        def start() -> str:
            self._store.follow()
            run_id = self._still_there(resume_run_id) or self._unfinished_stage(parent_run_id, inputs)
            if run_id:
                self._resume(run_id, config, free)
                return run_id
            created = self._store.client().create_run(
                self._store.experiment_id,
                run_name=stage,
                tags={
                    Tag.PARENT_RUN: parent_run_id,
                    Tag.KIND: "stage",
                    Tag.STAGE: stage,
                    Tag.INPUTS: inputs,
                    Tag.DATA_SHA256: data_digest,
                    Tag.DRIVER: this_driver(),
                    **self._parent_tags(parent),
                    **(split_params({Tag.FROM_RECORD: as_text(told)}) if told else {}),
                    **provenance_tags(),
                    **({Tag.SEED: str(config["SEED"])} if "SEED" in config else {}),
                    **_clean(tags),
                },
            )
            return str(created.info.run_id)

        run_id = self._store.patiently(start, self._patience)
        # Told again after a resume: a first attempt may have been cut off between creating the run and this.
        self._store.patiently(lambda: self._log_params(run_id, config, free), self._patience)
        used = tuple(datasets) or (DataUsed(f"{stage}-data", data_digest),)
        self._store.patiently(lambda: self._log_inputs(run_id, used, parent), self._patience)
        self.log_dict(run_id, config, "config.json")
        if told:
            self.log_dict(run_id, record_text(told), "weights_lineage.json")
        return run_id

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        if status not in END_STATES:
            raise MotipError("unknown end state of a run", where=run_id, found=status, expected=", ".join(END_STATES))
        if self._is_guest(run_id):
            return
        self._deliver(run_id, {"kind": "status", "status": status, "time": _now()})

    def mark_interrupted(self, run_id: str) -> None:
        """End a run that was cut off, and say so."""
        if self._is_guest(run_id):
            return
        self.set_tags(run_id, {Tag.INTERRUPTED: datetime.now(UTC).isoformat(timespec="seconds")})
        self.finish(run_id, "KILLED")

    # ---- what a run tells ----------------------------------------------------------------------------------------

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Append a point to each of the curves; never waits for a server that is away."""
        now = _now()
        points = [[name, float(value), now, int(step)] for name, value in metrics.items()]
        self._deliver(run_id, {"kind": "metrics", "points": points})

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._deliver(run_id, {"kind": "tags", "tags": _clean(tags)})

    def log_stage_result(
        self, run_id: str, checkpoint: Path | str, sha256: str, scores: Mapping[str, float], *, step: int = 0
    ) -> None:
        """The stage's best checkpoint: scores as ``best_<name>``, and a model known by address and sha256.

        The weights stay where they are. The model is registered as ``motip-curriculum`` with the stage as alias.

        Args:
            checkpoint: path or URI of the file.
            sha256: of the file.
            scores: name to value, such as HOTA or dance/HOTA.
            step: training step of the checkpoint.
        """
        self.log_metrics(run_id, {f"best_{name}": value for name, value in scores.items()}, step)
        place = lineage_walk.checkpoint_place(checkpoint, self._store.storage)
        self.set_tags(
            run_id,
            {
                Tag.CHECKPOINT_PATH: place.path,
                Tag.CHECKPOINT_RELATIVE: place.relative,
                Tag.CHECKPOINT_SHA256: sha256,
                Tag.CHECKPOINT_STEP: str(step),
            },
        )
        self._deliver(run_id, {"kind": "model", "uri": place.path, "sha256": sha256, "step": int(step)})

    def log_artifact(self, run_id: str, path: Path | str, folder: str = "") -> None:
        """Attach a file, under ``folder`` in the run's artifacts."""
        source = Path(path)
        if not source.is_file():
            raise MotipError("a file to attach to a run is missing", where=source, fix="check that it was written")
        self._deliver(run_id, {"kind": "artifact", "path": str(source), "folder": folder})

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Attach ``text`` as the file ``name`` (which may have folders in it)."""
        with self._attachment(run_id, name) as path:
            path.write_text(str(redact(text)))

    def log_dict(self, run_id: str, value: Mapping[str, Any], name: str) -> None:
        """Attach ``value`` as JSON."""
        with self._attachment(run_id, name) as path:
            path.write_text(json.dumps(redact(value), indent=1, sort_keys=True, default=str) + "\n")

    def log_table(self, run_id: str, header: SequenceOf[str], rows: SequenceOf[SequenceOf[Any]], name: str) -> None:
        """Attach a table in the form MLflow shows and ``mlflow.load_table`` reads; ``name`` ends in .json.

        Unlike MLflow's own ``log_table`` it replaces an earlier table of that name instead of adding to it.
        """
        self.log_dict(run_id, {"columns": list(header), "data": [list(row) for row in rows]}, name)
        self._deliver(run_id, {"kind": "table", "name": name})

    def log_figure(self, run_id: str, figure: Figure, name: str) -> None:
        """Attach a matplotlib figure; the format follows the name's suffix."""
        with self._attachment(run_id, name) as path:
            figure.savefig(path)

    def flush(self) -> int:
        """Deliver what waits from this and from earlier processes; returns how many entries still wait.

        What waits on is named in one warning, and is no error: a start goes on without it.
        """
        self._away_until = 0.0
        waiting, reason = 0, ""
        try:
            for run_id in self._spool.runs():
                away = time.monotonic() < self._away_until
                left, hindered = (self._spool.count(run_id), None) if away else self._replay(run_id)
                waiting += left
                if hindered is not None:
                    reason = reason or str(hindered)
                    # A server that does not answer is not asked for every run; a full disk may hold up one run only.
                    self._away_until = 0.0 if hindered.answers else time.monotonic() + self._rest
        except OSError as error:
            waiting, reason = max(waiting, 1), f"the queue cannot be used: {error}"
        if waiting:
            logger.warning(
                "%d entries from earlier still wait in %s: MLflow at %s cannot take them now (%s)",
                *(waiting, self._spool.folder, self.shown_uri, reason[:300]),
            )
        return waiting

    # ---- reading -------------------------------------------------------------------------------------------------

    def walk(self, run_id: str) -> list[LineageStep]:
        """Everything the run came from, oldest first; see ``motip.lineage.chain.walk``."""
        return self._store.patiently(lambda: lineage_walk.walk(self._store, run_id), self._patience)

    def verify(self, run_id: str, *, data: bool = True) -> list[FileCheck]:
        """Recompute the digests of all weights and data in the run's chain; see ``motip.lineage.verify``."""
        return verify(self.walk(run_id), self._store.storage, str(self._shards), data=data)

    def curriculum_of(self, run_id: str) -> str:
        """Name of the curriculum that a run is, or is a stage of."""
        return self._store.patiently(lambda: lineage_walk.curriculum_of(self._store, run_id), self._patience)

    def scores(self, run_id: str) -> RunScores:
        """The scores of every epoch of a stage; see ``motip.lineage.recorded_scores``."""
        return self._store.patiently(lambda: read_scores(self._store, run_id), self._patience)

    def compare_url_hint(self, run_ids: SequenceOf[str], port: int = 5000) -> tuple[str, str]:
        """The command that opens the MLflow UI on this machine (empty for a server) and the page comparing the runs."""
        command, base = "", self.shown_uri.rstrip("/")
        if not self._store.is_server:
            command = f"mlflow ui --backend-store-uri {shlex.quote(self.shown_uri)} --host 127.0.0.1 --port {port}"
            base = f"http://127.0.0.1:{port}"
        experiments = [self._store.patiently(lambda: self._store.experiment_id, self._patience)]
        runs, experiments_text = (
            urllib.parse.quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), experiments)
        )
        return command, f"{base}/#/compare-runs?runs={runs}&experiments={experiments_text}"

    # ---- delivery ------------------------------------------------------------------------------------------------

    def _deliver(self, run_id: str, entry: Entry) -> None:
        """Tell the server now, or put the entry behind those that wait."""
        if not self._spool.waiting(run_id) and time.monotonic() >= self._away_until:
            try:
                hand_over(self._store, self._spool, run_id, [entry])
                return
            except Unreachable as error:
                self._take_rest(error)
            except MotipError:
                hindered = refusal_of_all(self._store)
                if hindered is not None:
                    self._take_rest(hindered)
                elif entry["kind"] not in ATTACHED:
                    raise
                # Else a file that is too large for a proxy, say: it is set aside below, as if it had waited.
        try:
            if entry["kind"] == "artifact":
                entry = {**entry, "path": self._spool.keep_file(Path(entry["path"])), "kept": True}
            self._spool.append(run_id, entry)
        except OSError as error:
            raise MotipError(
                f"what MLflow does not take now cannot be kept either: {error.strerror or error}",
                where=self._spool.folder,
                expected="room, and the right to write",
                fix="make room, then run the same command again: it goes on where this one stopped",
            ) from error
        if time.monotonic() >= self._away_until:
            try:
                _, hindered = self._replay(run_id)
            except OSError as error:
                # The entry is kept, which is all that was asked for: the training goes on.
                hindered = Unreachable(f"the queue cannot be used: {error}")
            if hindered is not None:
                self._take_rest(hindered)

    def _replay(self, run_id: str) -> tuple[int, Unreachable | None]:
        """Deliver what waits of a run.

        Returns:
            How many entries still wait, and what hindered the first of them.
        """
        hindered: list[Unreachable] = []
        reasons: list[str] = []

        most = BATCH_METRICS

        def deliver(entries: list[Entry]) -> int:
            nonlocal most
            while True:
                batch = batch_of(entries, most)
                reason, taken = "", True
                try:
                    try:
                        hand_over(self._store, self._spool, run_id, batch)
                    except Unreachable:
                        raise
                    except Exception as error:
                        hinders_all = refusal_of_all(self._store)
                        if hinders_all is not None:
                            raise hinders_all from error
                        # It would come again at every start: whatever this entry is, it must not hold up the others.
                        told = error.what if isinstance(error, MotipError) else f"{type(error).__name__}: {error}"
                        reason = str(redact(told))[:500]
                        taken = (
                            len(batch) == 1
                            and batch[0]["kind"] == "metrics"
                            and hand_over_points(self._store, self._spool, run_id, batch[0])
                        )
                except Unreachable as error:
                    hindered.append(error)
                    return 0
                if taken:
                    most = min(2 * most, BATCH_METRICS)
                    return len(batch)
                if len(batch) == 1:
                    reasons.append(reason)
                    return 0
                # One of them is refused: the good ones before it go out, and it is found, in ever smaller batches.
                most = len(batch) // 2

        try:
            self._store.client()
            waiting = self._spool.replay(run_id, deliver, lambda entry: "" if hindered else reasons[-1])
        except Unreachable as error:
            return self._spool.count(run_id), error
        except MotipError as error:
            # It is the store that refuses, not one of the entries: whoever starts a run is told so.
            return self._spool.count(run_id), Unreachable(error.what)
        if reasons:
            logger.warning(
                "MLflow refused what was kept for run %s: %d entries set aside in %s, the first because: %s",
                *(run_id, len(reasons), self._spool.rejected(run_id), reasons[0]),
            )
        return waiting, hindered[0] if hindered else None

    def _take_rest(self, error: Unreachable) -> None:
        if time.monotonic() >= self._away_until:
            logger.warning(
                "MLflow at %s cannot be used now; keeping what is logged in %s and going on (%s)",
                *(self.shown_uri, self._spool.folder, str(error)[:200]),
            )
        self._away_until = time.monotonic() + self._rest

    @contextlib.contextmanager
    def _attachment(self, run_id: str, name: str) -> Iterator[Path]:
        """A path to write the artifact ``name`` to; it is delivered on leaving."""
        folder, _, filename = name.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / filename
            yield path
            self.log_artifact(run_id, path, folder)

    # ---- starting ------------------------------------------------------------------------------------------------

    def _find_runs(self, condition: str) -> list[Any]:
        """Runs of the experiment, the newest first."""
        return list(
            self._store.client().search_runs(
                [self._store.experiment_id], condition, max_results=200, order_by=["attributes.start_time DESC"]
            )
        )

    def _is_guest(self, run_id: str) -> bool:
        """Whether another process still has this run, which was found in its hands when it was started here."""
        if run_id not in self._guest_of:
            return False
        try:
            with self._store.errors():
                return driven_elsewhere(self._store.client().get_run(run_id))
        except (Unreachable, MotipError):
            return False  # as for any other run: what is told waits

    def _unfinished_stage(self, parent_run_id: str, inputs: str) -> str:
        condition = f"tags.`{Tag.PARENT_RUN}` = '{parent_run_id}' and tags.`{Tag.INPUTS}` = '{inputs}'"
        unfinished = [
            run for run in self._find_runs(condition) if run.info.status != "FINISHED" and not driven_elsewhere(run)
        ]
        return str(unfinished[0].info.run_id) if unfinished else ""

    def _still_there(self, run_id: str | None) -> str:
        if not run_id or find_run(self._store.client(), run_id) is not None:
            return run_id or ""
        logger.warning(
            "the run %s that this stage began is not in MLflow at %s any more (moved or deleted); a new run goes on "
            "with the stage, without the earlier epochs' curves",
            run_id,
            self.shown_uri,
        )
        return ""

    def _resume(self, run_id: str, config: Mapping[str, Any], free: Collection[str]) -> None:
        client = self._store.client()
        run = client.get_run(run_id)
        logged, wanted = join_params(run.data.params), join_params(split_params(config))
        changed = sorted(key for key in logged if not key.startswith("_") and logged[key] != wanted.get(key, ""))
        refused = [key for key in changed if key not in free]
        if refused:
            raise MotipError(
                f"run {run_id} was started with other parameters: {', '.join(refused)}",
                where=self.shown_uri,
                found=", ".join(f"{key}={wanted.get(key)}" for key in refused[:5]),
                expected=", ".join(f"{key}={logged[key]}" for key in refused[:5]),
                fix="start the stage as a new run (without resume_run_id)",
            )
        times = int(run.data.tags.get(Tag.RESUMED, "0")) + 1
        told = {**provenance()["git"], "time": datetime.now(UTC).isoformat()}
        if changed:
            told["changed"] = [f"{key} {logged[key][:100]} -> {wanted.get(key, 'unset')[:100]}" for key in changed]
        self._reopen(run_id)
        client.set_tag(run_id, Tag.RESUMED, str(times))
        client.set_tag(run_id, f"{Tag.RESUMED}.{times}", json.dumps(told))

    def _reopen(self, run_id: str) -> None:
        """Make an earlier run this process's; an end that still waits is of the time before, and is taken back."""
        try:
            if self._spool.waiting(run_id):
                self._spool.withdraw(run_id, "status")
        except OSError as error:
            logger.warning("an end of run %s may still come from %s: %s", run_id, self._spool.folder, error)
        client = self._store.client()
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, Tag.DRIVER, this_driver())

    def _log_params(self, run_id: str, config: Mapping[str, Any], free: Collection[str]) -> None:
        from mlflow.entities import Param

        client = self._store.client()
        logged = client.get_run(run_id).data.params
        # A free one keeps what it was started with whole: a longer value must not add a second part to it.
        kept = {key for key in free if key in logged}
        named = {key: value for key, value in config.items() if not key.startswith("_") and key not in kept}
        params = [Param(key, value) for key, value in split_params(named).items() if key not in logged]
        for start in range(0, len(params), BATCH_PARAMS):
            client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])

    def _log_inputs(self, run_id: str, used: SequenceOf[DataUsed], parent: Mapping[str, str | None]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        client = self._store.client()
        inputs = [
            DatasetInput(
                Dataset(
                    name=data.name,
                    digest=data.sha256[:32],
                    source_type="motip",
                    source=json.dumps({"sha256": data.sha256, **redact(data.source)}, sort_keys=True),
                    profile=json.dumps({"sha256": data.sha256, **redact(data.profile)}, sort_keys=True),
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in used
        ]
        run = client.get_run(run_id)
        known = {model.model_id for model in run.inputs.model_inputs} if run.inputs else set()
        model_id = latest_model(client, parent["run_id"]) if parent.get("run_id") else ""
        models = [LoggedModelInput(model_id=model_id)] if model_id and model_id not in known else None
        client.log_inputs(run_id, datasets=inputs, models=models)

    def _parent_tags(self, parent: Mapping[str, str | None]) -> dict[str, str]:
        if not parent:
            return {}
        place = lineage_walk.checkpoint_place(parent["path"] or "", self._store.storage)
        return {
            Tag.FROM_PATH: place.path,
            Tag.FROM_RELATIVE: place.relative,
            Tag.FROM_SHA256: parent["sha256"] or "",
            Tag.FROM_RUN: parent.get("run_id") or "",
        }


def _clean(tags: Mapping[str, str] | None) -> dict[str, str]:
    return {key: str(redact(value, re.split(r"[.]", key)[-1])) for key, value in (tags or {}).items()}


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
