"""Connection to Ray: start a local instance or join a running cluster, and query its resources."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

from motip.errors import MotipError


@dataclass(frozen=True)
class Cluster:
    """Resources of the connected Ray cluster.

    Attributes:
        cpus, gpus: logical CPUs and GPUs of all nodes.
        nodes: number of nodes that are alive.
        joined: True for a cluster at RAY_ADDRESS, False for a local instance.
        node_cpus: CPUs of each node alive, since a process cannot span two; empty: treat all CPUs as one node.
    """

    cpus: float
    gpus: float
    nodes: int
    joined: bool
    node_cpus: tuple[float, ...] = ()


def connect(num_cpus: int | None = None) -> Cluster:
    """Join the cluster at RAY_ADDRESS (set in submitted jobs), else start Ray on this machine.

    Args:
        num_cpus: CPUs of a local Ray; default all. Ignored when a cluster is joined.

    Raises:
        MotipError: the cluster is unreachable or rejects the token, or Ray cannot be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train's state messages duplicate the progress line.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import RayError

    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        if address:
            _check_reachable(address)
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            else:
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    # Ray Train queries it at the end of each run, and waits for seconds where there is none.
                    include_dashboard=True,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        except (ConnectionError, RayError, RuntimeError, ValueError, OSError) as error:
            raise MotipError(
                f"cannot {'join the Ray cluster' if address else 'start Ray on this machine'}: {error}",
                where=f"RAY_ADDRESS={address}" if address else "ray.init",
                fix="check that the head is running (`ray status`) and that RAY_AUTH_MODE=token and its token are set"
                if address
                else "free the port or directory in the message, or stop another Ray with `ray stop`",
            ) from error
    resources = ray.cluster_resources()
    node_cpus = tuple(float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"])
    return Cluster(resources.get("CPU", 0.0), resources.get("GPU", 0.0), len(node_cpus), bool(address), node_cpus)


def _check_reachable(address: str) -> None:
    """Raise MotipError within seconds if no Ray head listens; Ray itself retries silently for minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return  # `auto`, `local` and ray:// addresses are checked by Ray
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise MotipError(
            f"the Ray head is not reachable: {error.strerror or error}",
            where=f"RAY_ADDRESS={address}",
            expected="the address that `ray start --head` printed",
            fix="start the head, or unset RAY_ADDRESS to start Ray on this machine",
        ) from error


def disconnect() -> None:
    """Disconnect from the cluster; a local Ray stops."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
