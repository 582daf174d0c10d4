"""Local Ray shared by the tests that can share one; they run after the tests that start their own head."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from motip.cluster import Cluster, connect, disconnect

QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray Train polls its workers every two seconds by default; the tests are shorter than that."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "local_ray" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Cluster]:
    """A local Ray with two CPUs. Tests leave no actor running on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in QUICK.items():
            patch.setenv(name, value)
        cluster = connect(num_cpus=2)
        yield cluster
        disconnect()
