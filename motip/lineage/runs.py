"""Runs in MLflow: one parent run per curriculum, one child run per stage with its inputs; what they log is events."""

from __future__ import annotations

import json
import logging
import shlex
import urllib.parse
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from motip import events
from motip.errors import MotipError
from motip.lineage import chain as chains
from motip.lineage.provenance import provenance
from motip.lineage.record_file import read_record, record_json
from motip.lineage.recorder import MlflowRecorder, Outage, json_text
from motip.lineage.registered_model import find_run, latest_model
from motip.lineage.spool_v0_1 import import_spool
from motip.lineage.steps import DataUsed, LineageStep, provenance_tags
from motip.lineage.store import Store, Unreachable
from motip.lineage.tags import Tag, join_params, split_params
from motip.lineage.verify import FileCheck, verify_chain
from motip.storage.atomic import digest
from motip.storage.driver_process import driver_is_alive, this_driver
from motip.storage.paths import Location, download, sha256
from motip.storage.redaction import redact

logger = logging.getLogger(__name__)

_BATCH_PARAMS = 100
_END_STATES = ("FINISHED", "FAILED", "KILLED")


class Lineage:
    """Starts runs in MLflow, and records their event logs there. Run ids are explicit: processes share one storage.

    Starting a run needs the server. What a started run logs is appended to the event log of its folder; the
    :class:`motip.lineage.recorder.MlflowRecorder` of the log delivers it, now or once the server accepts it again.
    A curriculum is written by its driver alone, a trial of a sweep by the trial's process.

    Args:
        tracking_uri: address of MLflow; None: MLFLOW_TRACKING_URI, else SQLite under ``storage``.
        storage: folder for database, artifacts and offsets (``mlflow/`` under it).
        experiment: name of the MLflow experiment.
        patience: seconds that starting a run waits for an unreachable server.
        retry_interval: seconds without another attempt after the server was unreachable.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        storage: Path | str = "~/motip",
        experiment: str = "motip-curriculum",
        *,
        patience: float = 120.0,
        retry_interval: float = 15.0,
    ) -> None:
        self._store = Store(tracking_uri, storage, experiment, patience)
        self._shards = storage
        self._retry_interval = retry_interval
        self._outage = Outage(f"MLflow at {self.shown_uri}", retry_interval)
        self._recorders: dict[str, MlflowRecorder] = {}
        self._foreign_runs: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorders": {}}

    @property
    def tracking_uri(self) -> str:
        """The address in use, always absolute; may contain credentials: print ``shown_uri`` instead."""
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
        """Resume the unfinished parent run of a curriculum with this name and config, or start a new one.

        Its stages with status RUNNING are marked as interrupted, unless another live process of this host drives them.
        A parent run driven by such a process is shared, and only that process ends it.

        Args:
            reopen_finished: also resume a finished run of the same inputs.
            kind: `curriculum`, or `sweep` for the parent run of trials.

        Raises:
            MotipError: the server does not answer within ``patience``, or refuses.
        """
        inputs = digest([name, redact(config)])
        self._store.retry(self._store.check_location)
        self.deliver_all()

        def start() -> str:
            self._outage.over()
            earlier = self._find_runs(f"tags.`{Tag.INPUTS}` = '{inputs}' and tags.`{Tag.KIND}` = '{kind}'")
            for run in earlier:
                if run.info.status == "FINISHED" and not reopen_finished:
                    continue
                for child in self._find_runs(f"tags.`{Tag.PARENT_RUN}` = '{run.info.run_id}'"):
                    child_id, running = child.info.run_id, child.info.status == "RUNNING"
                    if running and not _driven_by_another(child) and not self._recorder(child_id).ended():
                        self.mark_interrupted(child_id)
                if _driven_by_another(run):
                    # Shared with the other process, which alone ends it.
                    self._foreign_runs.add(run.info.run_id)
                else:
                    self._send(run.info.run_id, events.Resumed(this_driver()))
                return str(run.info.run_id)
            facts = {Tag.KIND: kind, Tag.CURRICULUM: name, Tag.INPUTS: inputs, Tag.DRIVER: this_driver()}
            return self._create_run(name, {**facts, **redact(tags or {})})

        run_id = self._store.retry(start)
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
        folder: Location | None = None,
        datasets: SequenceOf[DataUsed] = (),
        tags: Mapping[str, str] | None = None,
        resumable_keys: Collection[str] = (),
    ) -> str:
        """Start or resume the run of one stage; interrupted and resumed stages keep one run.

        Args:
            parent_run_id: run of the curriculum.
            config: resolved configuration, keys as in the YAML; logged as ``config.json`` and, without keys that begin
                with an underscore (internal ones), as parameters.
            data_digest: hex sha256 over all data the stage reads.
            parent_checkpoint: ``{"path", "sha256", "run_id"}`` of the weights it starts from (run_id None for weights
                without a run: the chain then continues with the lineage record beside them); None for a start from
                scratch.
            resume_run_id: run to resume; without it, or if it is not in MLflow any more, an unfinished run of the same
                stage and inputs is searched for.
            folder: of the stage, whose event log is recorded in the run; None: a folder for the run's own log.
            datasets: the datasets, for MLflow's dataset inputs; by default one entry.
            resumable_keys: configuration keys that affect neither results nor inputs: a run resumes with other values
                of these. Its parameters keep the first values; the tag of the resume lists the differences.

        Raises:
            MotipError: the server does not answer within ``patience``, a resumed run was started with other parameters
                outside ``resumable_keys``, or the record beside the weights belongs to another file.
        """
        # identity
        config = redact(config)
        parent = dict(parent_checkpoint or {})
        fixed = {key: value for key, value in config.items() if key not in resumable_keys}
        inputs = digest([stage, fixed, data_digest, parent.get("sha256")])
        given = bool(parent) and not parent.get("run_id")
        record = read_record(parent["path"] or "", parent["sha256"] or "") if given else []

        # run
        def start() -> str:
            self._outage.over()
            run_id = self._existing(resume_run_id) or self._unfinished_stage(parent_run_id, inputs)
            if run_id:
                self._tag_resume(run_id, config, resumable_keys)
            else:
                tags_at_start = {
                    Tag.PARENT_RUN: parent_run_id,
                    Tag.KIND: "stage",
                    Tag.STAGE: stage,
                    Tag.INPUTS: inputs,
                    Tag.DATA_SHA256: data_digest,
                    Tag.DRIVER: this_driver(),
                    **self._parent_tags(parent),
                    **(split_params({Tag.FROM_RECORD: record_json(record)}) if record else {}),
                    **provenance_tags(),
                    **({Tag.SEED: str(config["SEED"])} if "SEED" in config else {}),
                    **redact(tags or {}),
                }
                run_id = self._create_run(stage, tags_at_start)
            recorder = self._recorder(run_id)
            if folder is not None:
                recorder.attach(folder)
            if recorder.log.exists():
                # Behind the end of the earlier attempt, so that a late delivery of it does not end this one.
                self._send(run_id, events.Resumed(this_driver()))
            return run_id

        run_id = self._store.retry(start)
        # parameters and inputs; again on a resume, since an attempt may be interrupted after creating the run
        self._store.retry(lambda: self._log_params(run_id, config, resumable_keys))
        used = tuple(datasets) or (DataUsed(f"{stage}-data", data_digest),)
        self._store.retry(lambda: self._log_inputs(run_id, used, parent))
        self.log_dict(run_id, config, "config.json")
        if record:
            self.log_dict(run_id, record_json(record), "weights_lineage.json")
        return run_id

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        if status not in _END_STATES:
            raise MotipError("unknown end state of a run", where=run_id, found=status, expected=", ".join(_END_STATES))
        if self._is_foreign(run_id):
            return
        self._send(run_id, events.Ended(status))

    def mark_interrupted(self, run_id: str) -> None:
        """End an interrupted run as KILLED, with the time in its tag."""
        if self._is_foreign(run_id):
            return
        self.set_tags(run_id, {Tag.INTERRUPTED: datetime.now(UTC).isoformat(timespec="seconds")})
        self.finish(run_id, "KILLED")

    # ---- logging ----------------------------------------------------------------------------------------

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Append a point to each metric, unless the last points are equal."""
        self._send(run_id, events.MetricsLogged({name: float(value) for name, value in metrics.items()}, int(step)))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._send(run_id, events.TagsSet(dict(tags)))

    def log_stage_result(
        self, run_id: str, checkpoint: Path | str, sha256: str, scores: Mapping[str, float], *, step: int = 0
    ) -> None:
        """Log the stage's best checkpoint: scores as ``best_<name>``, and an external model with path and sha256.

        The weights are not uploaded. The model is registered as ``motip-curriculum`` with the stage as alias.

        Args:
            checkpoint: path or URI of the file.
            sha256: hex digest of the file.
            scores: name -> value, such as HOTA or dance/HOTA.
            step: training step of the checkpoint.
        """
        self.log_metrics(run_id, {f"best_{name}": value for name, value in scores.items()}, step)
        recorded = chains.checkpoint_location(checkpoint, self._store.storage)
        self.set_tags(
            run_id,
            {
                Tag.CHECKPOINT_PATH: recorded.path,
                Tag.CHECKPOINT_RELATIVE: recorded.relative,
                Tag.CHECKPOINT_SHA256: sha256,
                Tag.CHECKPOINT_STEP: str(step),
            },
        )
        self._send(run_id, events.CheckpointChosen(recorded.path, sha256, int(step)))

    def log_artifact(self, run_id: str, file: Location, path: str = "") -> None:
        """Attach a file that stays where it is, as ``path`` (default: its name) among the run's artifacts."""
        if not file.is_file():
            raise MotipError("a file to attach to a run is missing", where=file, fix="check that it was written")
        recorder = self._recorder(run_id)
        # Relative, so that the storage can be moved.
        address = str(file).removeprefix(f"{recorder.log.folder}/").removeprefix(f"{self._store.storage}/")
        recorder.open()
        recorder.log.send(events.ArtifactWritten(address, path or file.name))  # always: the content may have changed
        recorder.log.close()
        recorder.catch_up()
        if recorder.remaining():
            # Not delivered yet: a later run may replace the file, so its present content is kept.
            kept = f"mlflow/logs/{run_id}/files/{sha256(file)[:12]}/{file.name}"
            download(file, self._store.storage / kept)
            recorder.log.send(events.ArtifactWritten(kept, path or file.name))
            recorder.log.close()

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Attach ``text`` as the file ``name``, which may contain folders."""
        self._send(run_id, events.TextWritten(name, str(redact(text))))

    def log_dict(self, run_id: str, value: Mapping[str, Any], name: str) -> None:
        """Attach ``value`` as JSON."""
        self.log_text(run_id, json_text(value), name)

    def log_table(self, run_id: str, header: SequenceOf[str], rows: SequenceOf[SequenceOf[Any]], name: str) -> None:
        """Attach a table in the format of MLflow's UI and ``mlflow.load_table``; ``name`` ends in .json.

        Unlike MLflow's ``log_table`` it replaces an earlier table of that name.
        """
        self._send(run_id, events.TableWritten(name, list(header), [list(row) for row in rows]))

    def catch_up(self, run_id: str, folder: Location | None = None) -> None:
        """Deliver what is new in a run's event log, which is in `folder` if given. Raises nothing of MLflow."""
        recorder = self._recorder(run_id)
        if folder is not None:
            recorder.attach(folder)
        recorder.catch_up()

    def deliver_all(self) -> int:
        """Deliver the remaining events of all runs of this storage; returns how many remain.

        Remaining events are a warning, not an error: a start continues without them.
        """
        import_spool(self._store.folder)
        self._outage.over()
        remaining, reason = 0, ""
        for recorder in map(self._recorder, MlflowRecorder.attached(self._store)):
            recorder.catch_up()
            if count := recorder.remaining():
                remaining, reason = remaining + count, reason or recorder.reason
        if remaining:
            logger.warning(
                "%d earlier events are not recorded yet: MLflow at %s cannot accept them now (%s)",
                remaining,
                self.shown_uri,
                reason[:300],
            )
        return remaining

    def _send(self, run_id: str, event: events.Event) -> None:
        """Append an event of the driver, unless it repeats the last one of its subject, and deliver it."""
        recorder = self._recorder(run_id)
        recorder.open()
        recorder.log.send_changed(event)
        recorder.log.close()  # an event of the driver that cannot be written is an error
        recorder.catch_up()

    def _recorder(self, run_id: str) -> MlflowRecorder:
        if run_id not in self._recorders:
            self._recorders[run_id] = MlflowRecorder(self._store, self._outage, run_id, self._retry_interval)
        return self._recorders[run_id]

    # ---- reading -------------------------------------------------------------------------------------------------

    def chain(self, run_id: str) -> list[LineageStep]:
        """The steps that led to a run, oldest first; see ``motip.lineage.chain.read_chain``."""
        return self._store.retry(lambda: chains.read_chain(self._store, run_id))

    def verify(self, run_id: str, *, data: bool = True) -> list[FileCheck]:
        """Recompute the digests of all weights and data in the run's chain; see ``motip.lineage.verify``."""
        return verify_chain(self.chain(run_id), self._store.storage, str(self._shards), data=data)

    def curriculum_of(self, run_id: str) -> str:
        """Name of the curriculum of a run, or of a stage's parent run."""
        return self._store.retry(lambda: chains.curriculum_of(self._store, run_id))

    def scores(self, run_id: str) -> chains.RunScores:
        """Scores of every epoch of a stage; see :func:`motip.lineage.chain.read_recorded_scores`."""
        return self._store.retry(lambda: chains.read_recorded_scores(self._store, run_id))

    def compare_url_hint(self, run_ids: SequenceOf[str], port: int = 5000) -> tuple[str, str]:
        """Command that starts the MLflow UI here ("" for a server), and URL of the page comparing the runs."""
        command, base = "", self.shown_uri.rstrip("/")
        if not self._store.is_server:
            command = f"mlflow ui --backend-store-uri {shlex.quote(self.shown_uri)} --host 127.0.0.1 --port {port}"
            base = f"http://127.0.0.1:{port}"
        experiments = [self._store.retry(lambda: self._store.experiment_id)]
        runs, experiments_text = (
            urllib.parse.quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), experiments)
        )
        return command, f"{base}/#/compare-runs?runs={runs}&experiments={experiments_text}"

    # ---- starting ------------------------------------------------------------------------------------------------

    def _find_runs(self, condition: str) -> list[Any]:
        """Runs of the experiment, the newest first."""
        return list(
            self._store.client().search_runs(
                [self._store.experiment_id], condition, max_results=200, order_by=["attributes.start_time DESC"]
            )
        )

    def _is_foreign(self, run_id: str) -> bool:
        """Whether another live process still drives a parent run that was shared when it was started here."""
        if run_id not in self._foreign_runs:
            return False
        try:
            with self._store.errors():
                return _driven_by_another(self._store.client().get_run(run_id))
        except (Unreachable, MotipError):
            return False  # events are delivered later, as for any other run

    def _unfinished_stage(self, parent_run_id: str, inputs: str) -> str:
        condition = f"tags.`{Tag.PARENT_RUN}` = '{parent_run_id}' and tags.`{Tag.INPUTS}` = '{inputs}'"
        unfinished = [
            run for run in self._find_runs(condition) if run.info.status != "FINISHED" and not _driven_by_another(run)
        ]
        return str(unfinished[0].info.run_id) if unfinished else ""

    def _existing(self, run_id: str | None) -> str:
        """The run id if MLflow has the run, else "" with a warning."""
        if not run_id or find_run(self._store.client(), run_id) is not None:
            return run_id or ""
        logger.warning(
            "the run %s of this stage is not in MLflow at %s any more (moved or deleted); the stage continues in a new "
            "run",
            run_id,
            self.shown_uri,
        )
        return ""

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        created = self._store.client().create_run(self._store.experiment_id, run_name=name, tags=dict(tags))
        return str(created.info.run_id)

    def _tag_resume(self, run_id: str, config: Mapping[str, Any], resumable_keys: Collection[str]) -> None:
        """Tag the resume of a stage's run; MotipError if parameters outside ``resumable_keys`` differ."""
        client = self._store.client()
        run = client.get_run(run_id)
        logged, wanted = join_params(run.data.params), join_params(split_params(config))
        changed = sorted(key for key in logged if not key.startswith("_") and logged[key] != wanted.get(key, ""))
        refused = [key for key in changed if key not in resumable_keys]
        if refused:
            raise MotipError(
                f"run {run_id} was started with other parameters: {', '.join(refused)}",
                where=self.shown_uri,
                found=", ".join(f"{key}={wanted.get(key)}" for key in refused[:5]),
                expected=", ".join(f"{key}={logged[key]}" for key in refused[:5]),
                fix="start the stage as a new run (without resume_run_id)",
            )
        times = int(run.data.tags.get(Tag.RESUMED, "0")) + 1
        resume = {**provenance()["git"], "time": datetime.now(UTC).isoformat()}
        if changed:
            resume["changed"] = [f"{key} {logged[key][:100]} -> {wanted.get(key, 'unset')[:100]}" for key in changed]
        client.set_tag(run_id, Tag.RESUMED, str(times))
        client.set_tag(run_id, f"{Tag.RESUMED}.{times}", json.dumps(resume))

    def _log_params(self, run_id: str, config: Mapping[str, Any], resumable_keys: Collection[str]) -> None:
        from mlflow.entities import Param

        client = self._store.client()
        logged = client.get_run(run_id).data.params
        # Resumable keys keep their first value: a longer new value must not add a second part to it.
        kept = {key for key in resumable_keys if key in logged}
        named = {key: value for key, value in config.items() if not key.startswith("_") and key not in kept}
        params = [Param(key, value) for key, value in split_params(named).items() if key not in logged]
        for start in range(0, len(params), _BATCH_PARAMS):
            client.log_batch(run_id, params=params[start : start + _BATCH_PARAMS])

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
        location = chains.checkpoint_location(parent["path"] or "", self._store.storage)
        return {
            Tag.FROM_PATH: location.path,
            Tag.FROM_RELATIVE: location.relative,
            Tag.FROM_SHA256: parent["sha256"] or "",
            Tag.FROM_RUN: parent.get("run_id") or "",
        }


def _driven_by_another(run: Any) -> bool:
    """Whether another live process of this host drives the run; a run that has ended is driven by none."""
    driver = run.data.tags.get(Tag.DRIVER, "")
    return run.info.status == "RUNNING" and driver != this_driver() and driver_is_alive(driver)
