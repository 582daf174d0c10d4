"""Conversions into one storage, one after the other and at the same time: nothing of another one is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motip.data import convert as convert_module
from motip.data.convert import convert
from motip.data.convert_report import ConvertReport, check_leakage
from motip.data.manifest import Manifest
from motip.data.overlay import write_overlays
from motip.errors import MotipError
from tests.data.test_convert import plan
from tests.helpers.raw_datasets import bdd_video, curriculum, mix, source, visdrone_video


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Data root with six training videos and one validation video of BDD100K, and one of each of VisDrone."""
    for index in range(6):
        bdd_video(tmp_path / "bdd", f"train{index}", 10)
    bdd_video(tmp_path / "bdd", "val0", 10, split="val")
    visdrone_video(tmp_path / "vis", "a", 20)
    visdrone_video(tmp_path / "vis", "v", 20, split="val")
    return tmp_path


def aerial() -> Any:
    """A curriculum of another source than that of ``plan``."""
    vis = source("vis", "visdrone", "vis", classes={"pedestrian": ("pedestrian",)})
    return curriculum([vis], [mix("vis", 1)], classes=("pedestrian",))


def test_what_another_run_wrote_meanwhile_stays(raw: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    meanwhile: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not meanwhile:
            meanwhile.append(convert(aerial(), raw, store))

    convert(plan(2), raw, store, map_fn=interrupted)
    assert Manifest.load(store).of("vis", "train") == meanwhile[0].manifest.of("vis", "train") != []


def test_a_second_conversion_waits_for_the_first_to_save(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    others: list[threading.Thread] = []

    def waits() -> list[str]:
        return [line for line in caplog.messages if line.startswith("waiting for another conversion")]

    def slow(*arguments: Any, **options: Any) -> list[str]:
        """The first conversion's check takes as long as the second one needs to come as far as it can."""
        if not others:
            others.append(threading.Thread(target=convert, args=(aerial(), raw, store)))
            others[0].start()
            while others[0].is_alive() and not waits():
                time.sleep(0.01)
        return check_leakage(*arguments, **options)

    def drawn(*arguments: Any) -> dict[str, str]:
        if threading.current_thread() not in others:
            others[0].join(timeout=120)
            assert not others[0].is_alive(), "pictures are drawn while others wait"
        return write_overlays(*arguments)

    monkeypatch.setattr(convert_module, "check_leakage", slow)
    monkeypatch.setattr(convert_module, "write_overlays", drawn)
    convert(plan(2), raw, store)
    assert Manifest.load(store).sources() == ["bdd", "vis"]
    assert {entry.source for entry in Manifest.load(store).videos} == {"bdd", "vis"}
    assert len(waits()) == 1


def test_where_nothing_can_be_locked_the_manifest_is_read_again_before_it_is_saved(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    checks = []

    def meanwhile(*arguments: Any, **options: Any) -> list[str]:
        checks.append(arguments)
        if len(checks) == 1:
            convert(aerial(), raw, store)
        return check_leakage(*arguments, **options)

    monkeypatch.setattr(convert_module, "one_at_a_time", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(convert_module, "check_leakage", meanwhile)
    report = convert(plan(2), raw, store)
    assert {entry.source for entry in Manifest.load(store).videos} == {"bdd", "vis"}
    assert report.manifest == Manifest.load(store)
    assert len(checks) == 3, "what the other one saved was not checked with ours"


def test_a_seed_stays_until_another_one_is_asked_for(raw: Path, tmp_path: Path) -> None:
    """A training converts without naming one, and must not undo that of the conversion before it."""
    store = tmp_path / "store"
    picks = {seed: convert(plan(2), raw, tmp_path / f"seed{seed}", seed=seed).manifest for seed in (0, 7)}
    assert picks[0].digest() != picks[7].digest()
    first = convert(plan(2), raw, store)
    assert first.manifest == picks[0]
    asked = convert(plan(2), raw, store, seed=7)
    assert asked.manifest == picks[7]
    assert [note for note in asked.notes if "seed 7 from now on" in note and "had seed 0" in note]
    kept = convert(plan(2), raw, store)
    assert kept.manifest == picks[7]
    assert kept.manifest.select("bdd", videos=1) == picks[7].select("bdd", videos=1)
    assert (kept.written, [note for note in kept.notes if "from now on" in note]) == (0, [])
    assert not [note for note in convert(plan(2), raw, store, seed=7).notes if "from now on" in note]
    assert convert(plan(2), raw, store, seed=0).manifest == picks[0]


def test_a_seed_that_changes_meanwhile_is_refused(raw: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert(aerial(), raw, store)
    meanwhile: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not meanwhile:
            meanwhile.append(convert(aerial(), raw, store, seed=7))

    with pytest.raises(MotipError, match="has changed the seed while this one ran"):
        convert(plan(2), raw, store, map_fn=interrupted)
    assert convert(plan(2), raw, store).manifest.seed == 7


def side_by_side(raw: Path, store: Path, other: Any) -> tuple[ConvertReport, ConvertReport]:
    """A first conversion, and another one that begins and ends while the first reads."""
    meanwhile: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not meanwhile:
            meanwhile.append(convert(other, raw, store))

    first = convert(plan(2), raw, store, map_fn=interrupted)
    return first, meanwhile[0]


def test_locks_of_other_splits_made_meanwhile_stay(raw: Path, tmp_path: Path) -> None:
    bdd_video(raw / "bdd", "test0", 10, split="test")
    store = tmp_path / "store"
    side_by_side(raw, store, plan(1, splits={"train": "train", "test": "test"}))
    assert Manifest.load(store).locked == {"bdd": {"val": ["val0"], "test": ["test0"]}}
    assert Manifest.load(store).of("bdd", "test")


def test_other_sequences_locked_meanwhile_are_refused(raw: Path, tmp_path: Path) -> None:
    bdd_video(raw / "bdd", "val1", 10, split="val")
    store = tmp_path / "store"
    with pytest.raises(MotipError, match="has locked other val sequences of 'bdd'"):
        side_by_side(raw, store, plan(1, sequences={"val": ("val1",)}))
    assert Manifest.load(store).locked == {"bdd": {"val": ["val1"]}}
