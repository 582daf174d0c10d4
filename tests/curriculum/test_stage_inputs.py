"""Inputs of a stage: protocol of each format, validation sources."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from motip.config import Source, load_curriculum
from motip.config.single_stage import KNOWN_DATASETS
from motip.data.formats.registry import READERS
from motip.evaluation.protocols import PLAN_CLASSES, find_protocol, protocol_for
from tests.helpers.small_curriculum import write_files


def source(format_name: str) -> Source:
    given = Source(name="videos", format="bdd100k", root=".", domain="ground")
    return given.model_copy(update={"format": format_name})


@pytest.mark.parametrize("format_name", READERS)
@pytest.mark.parametrize("classes", [("pedestrian",), PLAN_CLASSES, ("person",), ("boat", "bus")])
def test_every_format_has_a_protocol_that_is_defined_for_the_classes(
    format_name: str, classes: tuple[str, ...]
) -> None:
    protocol = find_protocol(protocol_for(source(format_name), classes))
    protocol.check_classes(classes)  # raises MotipError otherwise
    assert protocol.name in (format_name, "plain")


@pytest.mark.parametrize(
    ("format_name", "classes", "protocol"),
    [
        ("bdd100k", ("car", "pedestrian"), "bdd100k"),
        ("visdrone", ("pedestrian", "car"), "visdrone"),
        ("visdrone", ("pedestrian",), "plain"),
        ("motchallenge", ("pedestrian",), "motchallenge"),
        ("motchallenge", ("pedestrian", "car"), "plain"),
    ],
)
def test_protocol_of_a_format_and_its_classes(format_name: str, classes: tuple[str, ...], protocol: str) -> None:
    assert protocol_for(source(format_name), classes) == protocol


@pytest.mark.parametrize("classes", [("pedestrian",), PLAN_CLASSES])
def test_a_format_without_a_protocol_uses_plain(classes: tuple[str, ...]) -> None:
    assert protocol_for(source("kitti"), classes) == "plain"


def test_the_formats_of_the_configuration_are_those_with_a_reader() -> None:
    assert set(get_args(get_type_hints(Source)["format"])) == set(READERS)
    assert {known.format for known in KNOWN_DATASETS.values()} <= set(READERS)


def test_validation_sources_default_to_the_sources_of_the_data(tmp_path: Path) -> None:
    stage = load_curriculum(write_files(tmp_path)).stages[0]
    twice = stage.model_copy(update={"data": (*stage.data, *stage.data)})
    assert twice.validation_sources == ("ground",)
    assert stage.model_copy(update={"val": ("aerial",)}).validation_sources == ("aerial",)
