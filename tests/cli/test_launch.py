"""The --workers option, and the resource plan of a range of workers."""

from __future__ import annotations

import pytest

from motip.cli.launch import workers_range
from motip.cluster import Cluster
from motip.config import Config
from motip.errors import MotipError
from motip.train.ray_train import plan_resources


@pytest.mark.parametrize(("text", "expected"), [("4", (None, 4)), (0, (None, 0)), ("2:4", (2, 4)), ("1:1", (1, 1))])
def test_workers_is_a_number_or_a_range(text: str | int, expected: tuple[int | None, int]) -> None:
    assert workers_range(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "two", "4:2", "0:2", ":3", "1:", "1:2:3", "1.5"])
def test_other_values_of_workers_are_errors(text: str) -> None:
    with pytest.raises(MotipError) as error:
        workers_range(text)
    assert error.value.where == "--workers" and error.value.fix


def test_range_of_workers_is_planned_with_its_minimum() -> None:
    config = Config.from_dict({"NUM_WORKERS": 2})
    on_gpus = plan_resources(4, config, Cluster(16, 2, 2, True), min_workers=1)
    assert (on_gpus.workers, on_gpus.min_workers, on_gpus.gpu) == (4, 1, True)
    assert on_gpus.decoders > 0
    on_cpus = plan_resources(4, config, Cluster(2, 0, 1, True), min_workers=1)
    assert (on_cpus.workers, on_cpus.min_workers, on_cpus.cpus, on_cpus.decoders) == (4, 1, 1.0, 0)


@pytest.mark.parametrize(
    ("cluster", "found"), [(Cluster(2, 0, 1, True), "2 CPUs"), (Cluster(16, 2, 1, True), "2 GPUs")]
)
def test_fewer_resources_than_the_minimum_is_an_error(cluster: Cluster, found: str) -> None:
    with pytest.raises(MotipError) as error:
        plan_resources(8, Config.from_dict({"NUM_WORKERS": 1}), cluster, min_workers=3)
    assert error.value.found == found and "2:8" in str(error.value.fix)
