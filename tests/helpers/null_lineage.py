"""A lineage that records nothing, for tests without MLflow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.lineage.recorded_scores import RunScores
    from motip.lineage.steps import DataUsed, LineageStep
    from motip.lineage.verify import FileCheck


class NullLineage:
    """The methods of ``Lineage``; run ids are numbered."""

    def __init__(
        self,
        tracking_uri: str | None = None,
        storage: Path | str = "~/motip",
        experiment: str = "motip-curriculum",
        *,
        patience: float = 0.0,
        retry_interval: float = 0.0,
    ) -> None:
        self._started = 0

    def start_curriculum(
        self,
        name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        *,
        reopen_finished: bool = False,
        kind: str = "curriculum",
    ) -> str:
        return self._next(name)

    def start_stage(
        self,
        parent_run_id: str,
        stage: str,
        config: Mapping[str, Any],
        data_digest: str,
        parent_checkpoint: Mapping[str, str | None] | None,
        resume_run_id: str | None = None,
        *,
        folder: Any = None,
        datasets: SequenceOf[DataUsed] = (),
        tags: Mapping[str, str] | None = None,
        resumable_keys: Collection[str] = (),
    ) -> str:
        return resume_run_id or self._next(stage)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Record nothing."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Record nothing."""

    def log_stage_result(
        self, run_id: str, checkpoint: Path | str, sha256: str, scores: Mapping[str, float], *, step: int = 0
    ) -> None:
        """Record nothing."""

    def log_artifact(self, run_id: str, file: Any, path: str = "") -> None:
        """Record nothing."""

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Record nothing."""

    def log_dict(self, run_id: str, value: Mapping[str, Any], name: str) -> None:
        """Record nothing."""

    def log_table(self, run_id: str, header: SequenceOf[str], rows: SequenceOf[SequenceOf[Any]], name: str) -> None:
        """Record nothing."""

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Record nothing."""

    def mark_interrupted(self, run_id: str) -> None:
        """Record nothing."""

    def catch_up(self, run_id: str) -> int:
        return 0

    def deliver_all(self) -> int:
        return 0

    def chain(self, run_id: str) -> list[LineageStep]:
        raise _nothing_recorded(run_id)

    def verify(self, run_id: str, *, data: bool = True) -> list[FileCheck]:
        raise _nothing_recorded(run_id)

    def curriculum_of(self, run_id: str) -> str:
        raise _nothing_recorded(run_id)

    def scores(self, run_id: str) -> RunScores:
        raise _nothing_recorded(run_id)

    def compare_url_hint(self, run_ids: SequenceOf[str], port: int = 5000) -> tuple[str, str]:
        """Empty: nothing to open."""
        return "", ""

    def _next(self, name: str) -> str:
        self._started += 1
        return f"null-{self._started}-{name}"


def _nothing_recorded(run_id: str) -> MotipError:
    return MotipError(
        "no lineage was recorded", where=run_id, expected="a run recorded in MLflow", fix="run with MLflow lineage on"
    )
