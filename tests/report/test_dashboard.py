"""The dashboard: every panel, gaps at failed epochs, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from motip.cli.main import main
from motip.errors import MotipError
from motip.events import EpochDone, StepLogged
from motip.report.dashboard import COLOURS, LOWEST, dashboard, draw_dashboard
from motip.report.stage_history import STEPS_KEPT, History

PANELS = {
    "Losses": {"total", "detection", "ID"},
    "HOTA, IDF1, MOTA": {"HOTA", "IDF1", "MOTA"},
    "HOTA by class": {"car", "pedestrian"},
    "Detection: recall against precision": {"DetRe", "DetPr"},
    "Association against detection": {"AssA", "DetA"},
    "Detection recall by class": {"car", "pedestrian"},
    "Gradient norm before clipping": {"detector", "all others"},
    "Learning rate": {"backbone", "sampling points", "ID words, all others"},
    "Clips skipped": {"skipped"},
    "Throughput": {"clips per second"},
    "Waiting for data": {"waiting share"},
    "Memory, most in an epoch": {"memory"},
}


def metrics(epoch: int, scored: bool = True) -> dict[str, float]:
    values = {f"train/{name}": 4.0 / (epoch + 1) for name in ("loss", "detr_loss", "id_loss")}
    values |= {"train/detr_grad_norm": 9.0, "train/other_grad_norm": 1.5, "clips_per_s": 4.0 + epoch}
    values |= {"time/wait_share": 0.05, "device/memory_gib": 15.0, "clips_skipped": float(3 * epoch)}
    if scored:
        values |= {name: 10.0 + 5 * epoch for name in ("HOTA", "IDF1", "MOTA", "DetRe", "DetPr", "AssA", "DetA")}
        values |= {f"{name}/{each}": 20.0 for name in ("HOTA", "DetRe") for each in ("pedestrian", "car")}
    return values


def step(epoch: int, index: int, of: int = 4) -> StepLogged:
    rates = {"lr/backbone": 2e-6, "lr/linear_proj": 1e-6, "lr/dictionary": 2e-5, "lr/rest": 2e-5}
    named = {"loss": 3.0, "detr_grad_norm": 8.0, "other_grad_norm": 1.0, "memory_gib": 1.0, **rates}
    return StepLogged(epoch, index, of, of * epoch + index + 1, {f"step/{name}": v for name, v in named.items()})


def history(*epochs: int, planned: int = 8, unscored: tuple[int, ...] = ()) -> History:
    made = History("Vis-Adaptation", planned)
    for epoch in epochs:
        for index in range(4):
            made.read(step(epoch, index))
        made.read(EpochDone(epoch, 4 * epoch + 4, metrics(epoch, scored=epoch not in unscored)))
    return made


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def line(figure: Figure, title: str, label: str) -> np.ndarray:
    """(N, 2) points of a line."""
    found = next(each for each in panel(figure, title).lines if each.get_label() == label)
    return np.asarray(found.get_xydata())


def width_of(path: Path | str) -> int:
    picture = cv2.imread(str(path))
    assert picture is not None
    return int(picture.shape[1])


def stage(folder: Path, **record: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"status": "running", "inputs": "ab", "run_id": "r", **record}))
    (folder / "config.json").write_text(json.dumps({"EPOCHS": 5}))
    (folder / "job.json").write_text(json.dumps({"stage": "Vis-Adaptation", "best": "IDF1"}))
    return folder


def finished_epoch(folder: Path, epoch: int) -> None:
    (folder / f"epoch_{epoch:03d}").mkdir()
    stored = {"epoch": epoch, "step": 4 * epoch, "metrics": metrics(epoch)}
    (folder / f"epoch_{epoch:03d}" / "metrics.json").write_text(json.dumps(stored))


def test_all_panels_have_their_lines_and_units() -> None:
    figure = dashboard(history(0, 1, 2))
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    for title, labels in PANELS.items():
        axes = panel(figure, title)
        drawn = {each.get_label() for each in [*axes.lines, *axes.containers]}
        assert labels <= drawn, title
        assert axes.get_xlabel() == "epoch"
    units = [axes.get_ylabel() for axes in figure.axes]
    assert all(units) and {"percent", "GiB", "clips per second", "percent of the epoch's time"} <= set(units)
    width, height = figure.get_size_inches() * figure.dpi
    smallest = min(float(text.get_fontsize()) for axes in figure.axes for text in axes.get_xticklabels())
    assert width >= 1400 and height >= 1000 and smallest / 72 * figure.dpi * 880 / width >= 10  # px in a README


def test_points_are_at_their_epochs_counted_from_one() -> None:
    points = line(dashboard(history(0, 1, 2)), "Losses", "total")
    assert points.tolist() == [[1, 4.0], [2, 2.0], [3, pytest.approx(4 / 3)]]
    assert line(dashboard(history(0, 1)), "Waiting for data", "waiting share")[:, 1].tolist() == [5.0, 5.0]


def test_missing_epoch_is_a_gap_in_every_line_and_a_band() -> None:
    figure = dashboard(history(0, 1, 3, 4))
    for title, label in (("Losses", "total"), ("HOTA, IDF1, MOTA", "HOTA"), ("HOTA by class", "car")):
        points = line(figure, title, label)
        assert points[:, 0].tolist() == [1, 2, 3, 4, 5]
        assert np.isnan(points[:, 1]).tolist() == [False, False, True, False, False]
    rates = line(figure, "Learning rate", "backbone")
    assert np.isnan(rates[:, 1]).sum() == 1 and rates[np.isnan(rates[:, 1]), 0] == [2]
    for axes in figure.axes:
        bands = [
            patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches if patch.get_hatch()
        ]
        assert [(round(band.x0, 3), round(band.x1, 3)) for band in bands] == [(2.5, 3.5)]
    assert any("(3)" in text.get_text() for text in figure.texts)


def test_epoch_without_finite_loss_is_failed_but_unscored_epoch_is_not() -> None:
    made = history(0, 1, 2, 3, unscored=(1,))
    made.epochs[2]["train/loss"] = math.nan
    assert made.failed() == [2]
    figure = dashboard(made)
    assert line(figure, "HOTA, IDF1, MOTA", "HOTA")[:, 0].tolist() == [1, 3, 4]
    assert np.isnan(line(figure, "HOTA, IDF1, MOTA", "HOTA")[:, 1]).tolist() == [False, True, False]
    assert np.isfinite(line(figure, "Losses", "ID")[:, 1]).tolist() == [True, True, False, True]


def test_skipped_clips_are_counted_per_epoch() -> None:
    axes = panel(dashboard(history(0, 1, 2)), "Clips skipped")
    assert [(round(bar.get_center()[0], 6), bar.get_height()) for bar in axes.containers[0]] == [(1, 0), (2, 3), (3, 3)]
    assert any("6 in all" in text.get_text() for text in axes.texts)


def test_mota_below_the_axis_is_an_arrow_with_its_value() -> None:
    made = history(0, 1)
    made.epochs[0]["MOTA"] = -312.0
    axes = panel(dashboard(made), "HOTA, IDF1, MOTA")
    assert axes.get_ylim()[0] >= LOWEST - 10
    assert [text.get_text() for text in axes.texts] == ["-312"]


def test_history_without_scores_or_steps_is_drawn_with_empty_panels() -> None:
    made = History("only", 3)
    made.read(EpochDone(0, 0, metrics(0, scored=False)))
    figure = dashboard(made)
    empty = {
        axes.get_title(loc="left")
        for axes in figure.axes
        if [text.get_text() for text in axes.texts] == ["not recorded yet"]
    }
    assert empty == {title for title in PANELS if "HOTA" in title or "Det" in title or "Ass" in title} | {
        "Learning rate"
    }
    assert any("no epoch is scored yet" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("lost", ["red", "green", "blue"])
def test_first_colours_differ_under_colour_blindness(lost: str) -> None:
    """Viénot, Brettel and Mollon (1999) for red and green, and the analogous matrix for blue, in linear RGB."""
    weights = {
        "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        "blue": [[1, 0.1461, -0.1461], [0, 0.8591, 0.1409], [0, 0.8591, 0.1409]],
    }[lost]
    perceived = [np.array(weights) @ np.array(to_rgb(colour)) ** 2.2 for colour in COLOURS[:3]]
    distances = [np.abs(a - b).max() for index, a in enumerate(perceived) for b in perceived[index + 1 :]]
    assert min(distances) > 0.08


def test_stage_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = stage(tmp_path / "stage")
    for epoch in (0, 1, 3):
        finished_epoch(folder, epoch)
    made = draw_dashboard(folder, tmp_path / "out.png")
    assert (made.stage, made.planned, made.best, made.finished) == ("Vis-Adaptation", 5, "IDF1", False)
    assert made.failed() == [2] and made.best_epoch() == 3
    assert width_of(tmp_path / "out.png") == 1500


def test_folder_without_a_stage_or_an_epoch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="not a stage's folder"):
        draw_dashboard(tmp_path, tmp_path / "out.png")
    with pytest.raises(MotipError, match="no finished epoch"):
        draw_dashboard(stage(tmp_path / "stage"), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_many_steps_are_thinned_evenly() -> None:
    made = History("long", 9)
    for number in range(3 * STEPS_KEPT):
        named = {"step/loss": 1.0, "step/time/wait_s": 2.0}
        made.read(StepLogged(number // 1000, number % 1000, 1000, number, named))
    assert STEPS_KEPT / 2 <= len(made.steps) <= STEPS_KEPT
    assert {epoch for epoch, _, _ in made.steps} == set(range(6)) and set(made.steps[0][2]) == {"loss"}


def test_command_accepts_the_parent_folder_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stage(tmp_path / "Vis-Adaptation" / "abcdef")
    finished_epoch(folder, 0)
    for arguments, status in (
        (["Vis-Adaptation"], 0),
        (["Vis-Adaptation", "--out", "there.png"], 0),
        (["Vis-Adaptation", "--out", "there.jpg"], 2),
        (["nowhere"], 2),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["motip", "report", "dashboard", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert int(end.value.code or 0) == status, capsys.readouterr().err
    assert (folder / "dashboard.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    error = capsys.readouterr().err
    assert "there is no such run" in error and "ends in .png" in error
