"""Number of concurrent trials of a sweep and the resources of each, calculated from the cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from motip.cluster import Cluster
from motip.config import Config
from motip.errors import MotipError
from motip.train.ray_train import ResourcePlan, plan_resources

_DECODER_CPUS = 0.5
"""CPUs that a decoding actor should have if trials run concurrently."""


@dataclass(frozen=True)
class ConcurrencyPlan:
    """Number of concurrent trials, the resources of each, and the calculation as text."""

    max_concurrent_trials: int
    resources: ResourcePlan
    calculation: str


def plan_concurrency(workers: int, config: Config, cluster: Cluster, requested: int | None = None) -> ConcurrencyPlan:
    """Divide a cluster among trials; raise, with the calculation, for a request that would wait forever.

    With GPUs a trial takes one per worker. Without, it takes a CPU per worker and half a CPU per decoding actor; if
    even a single trial exceeds that, it runs alone and shares the CPUs.

    Args:
        workers: training workers of each trial.
        requested: trials that must fit concurrently; None for as many as fit.

    Raises:
        MotipError: a single trial does not fit, or fewer trials than requested.
    """
    # one trial
    if workers < 1:
        raise MotipError(
            "a trial needs at least one worker", where="--workers-per-trial", found=workers, expected="1 or more"
        )
    try:
        alone = plan_resources(workers, config, cluster)
    except MotipError as error:
        raise MotipError(
            f"a single trial does not fit: {error.what}",
            where="--workers-per-trial",
            found=error.found,
            expected=error.expected,
            fix="lower --workers-per-trial, or add nodes",
        ) from None

    # trials that fit, by CPUs and by GPUs
    cpus = workers * (1 + _DECODER_CPUS * alone.decoders)
    fitting = math.floor(cluster.cpus / cpus + 1e-9)
    parts = [f"{cluster.cpus:g} CPUs / ({workers} x (1 + {alone.decoders} x {_DECODER_CPUS:g}) per trial) = {fitting}"]
    if alone.gpu:
        fit_gpus = math.floor(cluster.gpus / workers)
        parts.append(f"{cluster.gpus:g} GPUs / ({workers} x 1 per trial) = {fit_gpus}")
        fitting = min(fitting, fit_gpus)
    concurrent = max(1, fitting)
    shared = "" if fitting else ", sharing the CPUs"
    calculation = f"{'; '.join(parts)}: {concurrent} concurrently{shared}"
    if requested is not None and requested > concurrent:
        raise MotipError(
            "so many trials do not fit concurrently",
            where="--at-once",
            found=requested,
            expected=f"at most {concurrent}: {calculation}",
            fix="lower --at-once or --workers-per-trial, or add nodes",
        )

    # resources of each trial
    concurrent = concurrent if requested is None else max(1, requested)
    together = plan_resources(workers * concurrent, config, cluster)
    return ConcurrencyPlan(concurrent, replace(together, workers=workers, concurrent_runs=concurrent), calculation)
