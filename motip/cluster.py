"""Start a local Ray or join the running one, with token authentication on; what the cluster has to give."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

from motip.errors import MotipError

OWN = "MOTIP_OWN_RAY"
"""Set in every process of a Ray that `connect` started: it has no dashboard, and ends with the driver."""


@dataclass(frozen=True)
class Cluster:
    """What there is to share out: CPUs, GPUs and nodes alive, and how this process came to them.

    Attributes:
        node_cpus: CPUs of each node alive. A process is never split over two; empty: as if all CPUs were of one node.
    """

    cpus: float
    gpus: float
    nodes: int
    joined: bool
    node_cpus: tuple[float, ...] = ()


def connect(num_cpus: int | None = None) -> Cluster:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it set), else start Ray on this machine.

    Args:
        num_cpus: CPUs of a local Ray; default all. Without effect on a cluster that is joined.

    Raises:
        MotipError: the cluster does not answer, or refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train's own notices repeat what the progress line says.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import RayError

    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        os.environ.pop(OWN, None)
        if address:
            _check_answers(address)
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            else:
                os.environ[OWN] = "1"
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        except (ConnectionError, RayError, RuntimeError, ValueError, OSError) as error:
            raise MotipError(
                f"cannot {'join the Ray cluster' if address else 'start Ray on this machine'}: {error}",
                where=f"RAY_ADDRESS={address}" if address else "ray.init",
                fix="check that the head is running (`ray status`) and that RAY_AUTH_MODE=token and its token are set"
                if address
                else "free the port or directory that the message names, or stop another Ray with `ray stop`",
            ) from error
    resources = ray.cluster_resources()
    node_cpus = tuple(float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"])
    return Cluster(resources.get("CPU", 0.0), resources.get("GPU", 0.0), len(node_cpus), bool(address), node_cpus)


def _check_answers(address: str) -> None:
    """Fail in seconds where nobody listens; Ray itself would try for minutes without a word."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return  # `auto`, `local` and ray:// addresses are left to Ray
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise MotipError(
            f"no Ray head answers: {error.strerror or error}",
            where=f"RAY_ADDRESS={address}",
            expected="the address that `ray start --head` printed",
            fix="start the head, or unset RAY_ADDRESS to start Ray on this machine",
        ) from error


def disconnect() -> None:
    """Leave the cluster; a local Ray stops."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    os.environ.pop(OWN, None)
