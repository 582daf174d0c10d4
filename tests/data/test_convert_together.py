"""Concurrent and consecutive conversions into one storage: no results are lost."""

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
    """A curriculum with another source than ``plan``."""
    vis = source("vis", "visdrone", "vis", classes={"pedestrian": ("pedestrian",)})
    return curriculum([vis], [mix("vis", 1)], classes=("pedestrian",))


def test_results_of_a_concurrent_conversion_are_kept(raw: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    concurrent: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not concurrent:
            concurrent.append(convert(aerial(), raw, store))

    convert(plan(2), raw, store, map_fn=interrupted)
    assert Manifest.load(store).of("vis", "train") == concurrent[0].manifest.of("vis", "train") != []


def test_second_conversion_waits_for_the_first_to_save(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    others: list[threading.Thread] = []

    def waits() -> list[str]:
        return [line for line in caplog.messages if line.startswith("waiting for another conversion")]

    def slow(*arguments: Any, **options: Any) -> list[str]:
        """Delay the first conversion's check until the second one waits for the lock."""
        if not others:
            others.append(threading.Thread(target=convert, args=(aerial(), raw, store)))
            others[0].start()
            while others[0].is_alive() and not waits():
                time.sleep(0.01)
        return check_leakage(*arguments, **options)

    def after_the_other(*arguments: Any) -> dict[str, str]:
        if threading.current_thread() not in others:
            others[0].join(timeout=120)
            assert not others[0].is_alive(), "overlays are drawn while another conversion waits for the lock"
        return write_overlays(*arguments)

    monkeypatch.setattr(convert_module, "check_leakage", slow)
    monkeypatch.setattr(convert_module, "write_overlays", after_the_other)
    convert(plan(2), raw, store)
    assert Manifest.load(store).sources() == ["bdd", "vis"]
    assert {entry.source for entry in Manifest.load(store).videos} == {"bdd", "vis"}
    assert len(waits()) == 1


def test_without_locks_the_manifest_is_read_again_before_saving(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    checks = []

    def concurrent(*arguments: Any, **options: Any) -> list[str]:
        checks.append(arguments)
        if len(checks) == 1:
            convert(aerial(), raw, store)
        return check_leakage(*arguments, **options)

    monkeypatch.setattr(convert_module, "exclusive_lock", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(convert_module, "check_leakage", concurrent)
    report = convert(plan(2), raw, store)
    assert {entry.source for entry in Manifest.load(store).videos} == {"bdd", "vis"}
    assert report.manifest == Manifest.load(store)
    assert len(checks) == 3, "the merged manifest was not checked"


def test_seed_of_a_storage_is_kept_until_another_is_requested(raw: Path, tmp_path: Path) -> None:
    """Training converts without a seed and must keep that of the previous conversion."""
    store = tmp_path / "store"
    picks = {seed: convert(plan(2), raw, tmp_path / f"seed{seed}", seed=seed).manifest for seed in (0, 7)}
    assert picks[0].digest() != picks[7].digest()
    first = convert(plan(2), raw, store)
    assert first.manifest == picks[0]
    requested = convert(plan(2), raw, store, seed=7)
    assert requested.manifest == picks[7]
    assert [note for note in requested.notes if "seed 7 from now on" in note and "had seed 0" in note]
    kept = convert(plan(2), raw, store)
    assert kept.manifest == picks[7]
    assert kept.manifest.select("bdd", videos=1) == picks[7].select("bdd", videos=1)
    assert (kept.written, [note for note in kept.notes if "from now on" in note]) == (0, [])
    assert not [note for note in convert(plan(2), raw, store, seed=7).notes if "from now on" in note]
    assert convert(plan(2), raw, store, seed=0).manifest == picks[0]


def test_concurrent_change_of_the_seed_is_an_error(raw: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert(aerial(), raw, store)
    concurrent: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not concurrent:
            concurrent.append(convert(aerial(), raw, store, seed=7))

    with pytest.raises(MotipError, match="concurrent conversion into this storage changed the seed"):
        convert(plan(2), raw, store, map_fn=interrupted)
    assert convert(plan(2), raw, store).manifest.seed == 7


def side_by_side(raw: Path, store: Path, other: Any) -> tuple[ConvertReport, ConvertReport]:
    """Reports of a conversion and of another one that runs completely while the first reads."""
    concurrent: list[ConvertReport] = []

    def interrupted(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        yield from map(function, jobs)
        if not concurrent:
            concurrent.append(convert(other, raw, store))

    first = convert(plan(2), raw, store, map_fn=interrupted)
    return first, concurrent[0]


def test_concurrent_locks_of_other_splits_are_kept(raw: Path, tmp_path: Path) -> None:
    bdd_video(raw / "bdd", "test0", 10, split="test")
    store = tmp_path / "store"
    side_by_side(raw, store, plan(1, splits={"train": "train", "test": "test"}))
    assert Manifest.load(store).locked == {"bdd": {"val": ["val0"], "test": ["test0"]}}
    assert Manifest.load(store).of("bdd", "test")


def test_concurrent_locks_of_other_sequences_are_an_error(raw: Path, tmp_path: Path) -> None:
    bdd_video(raw / "bdd", "val1", 10, split="val")
    store = tmp_path / "store"
    with pytest.raises(MotipError, match="locked other val sequences of 'bdd'"):
        side_by_side(raw, store, plan(1, sequences={"val": ("val1",)}))
    assert Manifest.load(store).locked == {"bdd": {"val": ["val1"]}}
