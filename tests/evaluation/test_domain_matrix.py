"""Stage-by-domain matrix: sources and classes, ancestors, table and heat map, subsampling."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.evaluation.domain_matrix import DomainMatrix, subsample
from motip.evaluation.evaluator import remap_classes
from motip.evaluation.scores import Scores
from motip.report.domain_table import domain_table
from motip.report.heatmap import heat_map, png_of


def scores(**classes: float | None) -> Scores:
    values = {name: {"HOTA": value} for name, value in classes.items()}
    labelled = [value for value in classes.values() if value is not None]
    mean: Any = {"HOTA": sum(labelled) / len(labelled)}
    return Scores("plain", tuple(classes), "val", ("v0",), mean, mean, mean, values, {})  # type: ignore[arg-type]


def matrix(**options: Any) -> DomainMatrix:
    return DomainMatrix.from_sources(
        {
            "base": {"dance": {"d": scores(pedestrian=60.0)}, "ground": {"g": scores(pedestrian=30.0, car=0.0)}},
            "one": {"dance": {"d": scores(pedestrian=58.0)}, "ground": {"g": scores(pedestrian=20.0, car=50.0)}},
            "two": {"dance": {"d": scores(pedestrian=40.0)}, "ground": {"g": scores(pedestrian=21.0, car=48.0)}},
        },
        **options,
    )


def test_domain_value_is_the_mean_over_sources_and_classes() -> None:
    built = DomainMatrix.from_sources(
        {"one": {"ground": {"a": scores(pedestrian=20.0, car=40.0), "b": scores(pedestrian=50.0, car=None)}}}
    )
    assert built.values == {"one": {"ground": 40.0}}
    assert built.by_class == {"one": {"ground": {"pedestrian": 35.0, "car": 40.0}}}
    assert built.row_dict("one") == {"R/ground": 40.0, "R/ground/pedestrian": 35.0, "R/ground/car": 40.0}
    assert built.cells("one") == {"R/one/ground": 40.0, "R/one/ground/pedestrian": 35.0, "R/one/ground/car": 40.0}


def test_different_sources_or_classes_of_a_domain_are_an_error() -> None:
    one = {"ground": {"a": scores(car=40.0)}}
    with pytest.raises(MotipError, match="different sources"):
        DomainMatrix.from_sources({"one": one, "two": {"ground": {"b": scores(car=40.0)}}})
    with pytest.raises(MotipError, match="different classes"):
        DomainMatrix.from_sources({"one": one, "two": {"ground": {"a": scores(pedestrian=4.0, car=40.0)}}})


def test_class_loss_is_reported_although_the_mean_grows() -> None:
    built = matrix()
    assert built.forgotten("one") == []
    (lost,) = built.forgotten("one", each_class=True)
    assert (lost.name, lost.loss) == ("ground pedestrian", 10.0)
    assert [each.name for each in built.forgotten("two", each_class=True)] == ["dance", "ground pedestrian"]


def test_forgetting_compares_only_trained_domains_and_ancestors() -> None:
    trained = {"base": {"dance"}, "one": {"dance", "ground"}, "two": {"dance", "ground"}}
    assert matrix(trained_on=trained).forgotten("one", each_class=True) == []
    apart = matrix(ancestors={"base": (), "one": ("base",), "two": ()})
    assert apart.forgotten("two", each_class=True) == []
    assert apart.forgotten("one", each_class=True) != []


def test_backward_transfer_after_any_stage() -> None:
    built = matrix()
    assert built.backward_transfer({"dance": "base", "ground": "one"}, "one") == pytest.approx(-2.0)
    assert built.backward_transfer({"dance": "base", "ground": "one"}, "two") == pytest.approx((-20.0 - 0.5) / 2)
    assert built.backward_transfer({"dance": "base"}, "base") is None


def test_table_marks_losses_and_zero_shot_values() -> None:
    stream = io.StringIO()
    built = matrix(trained_on={"base": {"dance"}, "one": {"dance", "ground"}, "two": {"dance", "ground"}})
    table = domain_table(built, {"base": None, "one": -2.0, "two": -10.25})
    Console(file=stream, width=140).print(table)
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    base, one, two = (next(line for line in lines if line.startswith(name)).split() for name in ("base", "one", "two"))
    assert base == ["base", "60.0", "15.0*", "30.0*", "0.0*", "-"]
    assert one == ["one", "58.0", "35.0", "20.0", "50.0", "-2.0"]
    assert two == ["two", "40.0", "(-20.0)", "34.5", "21.0", "48.0", "-10.2"]
    assert "zero-shot" in stream.getvalue()


def test_heat_map_frames_losses_and_leaves_unscored_cells_empty() -> None:
    built = replace(
        matrix(), values={**matrix().values, "base": {"dance": 60.0}}, by_class={**matrix().by_class, "base": {}}
    )
    figure = heat_map(built)
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert "40.0\n-20.0" in texts and len(texts) == 1 + 4 + 4
    assert len([patch for patch in axes.patches if isinstance(patch, Rectangle)]) == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "one", "two"]
    assert png_of(figure).startswith(b"\x89PNG")


def test_subsample_is_deterministic_and_contains_every_class() -> None:
    videos: Any = [
        SimpleNamespace(
            sequence=f"s{number}",
            segment=0,
            identity=("x", "val", f"s{number}"),
            boxes={"car": 5, **({"person": 2} if number == 7 else {})},
            ignored={"car": 5} if number == 3 else {},
        )
        for number in range(10)
    ]
    classes = {"pedestrian": ("person",), "car": ("car",)}
    picked = subsample(videos, 2, classes, seed=0)
    assert len(picked) == 2 and videos[7] in picked
    assert subsample(videos[::-1], 2, classes, seed=0) == picked
    assert subsample(videos, 99, classes, seed=0) == videos


def test_remap_classes_converts_ids_and_drops_other_classes() -> None:
    rows = TrackRows(
        np.arange(3), np.arange(3), np.zeros((3, 4), np.float32), np.ones(3, np.float32), np.array([0, 1, 2])
    )
    assert remap_classes(rows, ("a", "b", "c"), ("a", "b", "c")) is rows
    same = remap_classes(rows, ("bus", "person", "car"), ("pedestrian", "car"))
    assert list(same.class_ids) == [0, 1] and list(same.track_ids) == [1, 2]
    assert len(remap_classes(TrackRows.empty(), ("a",), ("b",))) == 0
