"""Training of a stage in the test's process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import motip.train.loop as loop
from motip.config import Config
from motip.events import Event
from motip.stage_folder import StageFolder
from motip.train.batch_sources import LocalBatchSource
from motip.train.checkpoint_stores import FolderStore
from motip.train.collectives import SingleProcess
from motip.train.retention import Retention
from motip.train.run_channel import Heartbeat, RunChannel
from motip.train.stage_job import StageJob


class CallbackChannel(RunChannel):
    """Channel of a training in this process that calls a function with every event, after it is in the log."""

    def __init__(self, folder: Path | str, on_event: Callable[[Event], None]) -> None:
        super().__init__(str(folder))
        self._on_event = on_event

    def send(self, event: Event) -> None:
        super().send(event)
        self._on_event(event)

    def heartbeat(self, rank: int, heartbeat: Heartbeat) -> None:
        """Through the store of torch.distributed, if several ranks train."""
        if dist.is_initialized():
            _store().set(str(rank), json.dumps(asdict(heartbeat)))

    def heartbeats(self) -> dict[int, Heartbeat]:
        sent = [rank for rank in range(dist.get_world_size()) if _store().check([str(rank)])]
        return {rank: Heartbeat(**json.loads(_store().get(str(rank)))) for rank in sent}


@functools.cache
def _store() -> dist.Store:
    # A separate connection: a call through the group's own would queue behind its blocking calls.
    return dist.PrefixStore("heartbeats", _get_default_store().clone())


def folder_store(folder: Path | str, retention: Retention | None = None) -> FolderStore:
    return FolderStore(StageFolder(folder), retention)


def train_in_process(
    job: StageJob,
    folder: Path | str,
    on_event: Callable[[Event], None],
    *,
    channel: RunChannel | None = None,
    store: FolderStore | None = None,
) -> None:
    """Train a stage on one rank with the batches of this process."""
    config = Config.from_dict(job.config)
    loop.train_stage_on_worker(
        job,
        SingleProcess(),
        LocalBatchSource(job, config),
        channel or CallbackChannel(folder, on_event),
        store or folder_store(folder),
        torch.device("cpu"),
    )
