"""Performance pages: rendered from the results in docs/performance/, including what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import page, plots
from benchmarks.records import Claim, Record, quantity
from benchmarks.results import FOLDER, Machine, document, read, read_all
from benchmarks.targets import TARGETS

CPU = {"cpu": "Some CPU", "cores": 2, "memory_gb": 16, "gpu": None}
GPU = {**CPU, "gpu": {"name": "Some GPU", "memory_gb": 80, "cuda": "12.8"}}


def record(work: str, *quantities: object, configuration: dict[str, object] | None = None, **more: object) -> Record:
    values = {"command": "python -m x", "date": "2026-01-02", "load": (1.0, 2.0), "baseline": "naive", **more}
    return Record(work, configuration or {"threads": 1}, quantities=quantities, **values)  # type: ignore[arg-type]


def machine(*claims: Claim, hardware: dict[str, object] = CPU) -> Machine:
    return Machine("some-cpu", hardware, {claim.name: claim for claim in claims})


def test_pages_are_up_to_date() -> None:
    machines = read_all()
    assert page.PAGE.read_text() == page.render(machines), "run python -m benchmarks.page"
    assert page.DETAILS.read_text() == page.render_details(machines), "run python -m benchmarks.page"


def test_page_of_targets_is_short_and_links_every_measurement() -> None:
    text = page.render(read_all())
    assert len(text.splitlines()) <= 150
    titles = [line[3:] for line in page.render_details(read_all()).splitlines() if line.startswith("## ")]
    assert all(f"* [{title}](" in text for title in titles if "torch.compile" not in title) and len(titles) > 5


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_derived_values_in_results_are_up_to_date(file: Path) -> None:
    """Ratios, targets and verdicts in the file follow from its figures and the current targets."""
    assert json.loads(file.read_text()) == document(read(file))
    assert not any(claim.quick for claim in read(file).claims.values())


def test_growth_plots_exist() -> None:
    having = [each.claims[plots.CLAIM] for each in read_all() if plots.CLAIM in each.claims]
    drawn = [each.work for claim in having for each in claim.records]
    assert drawn
    assert {path.name for path in page.PICTURES.glob("growth_*.png")} == set(map(plots.file_name, drawn))


def test_a_target_is_met_or_missed_by_its_record() -> None:
    tracker = Claim(
        "tracker",
        "Tracker",
        {},
        records=[
            record("20 objects", quantity("ms per frame", [9.0, 8.0, 10.0], 36.0)),
            record("50 objects", quantity("ms per frame", 30.0, 100.0)),
        ],
    )
    lines = page.render([machine(tracker)]).splitlines()
    details = page.render_details([machine(tracker)]).splitlines()
    table = [line for line in lines if line.startswith("| Tracker")]
    assert table[0] == (
        "| Tracker besides the detector, 20 objects | ms per frame | 9 | 36 | 0.25 | ≤ 11 | met | 2026-01-02 |"
    )
    assert "| 30 | 100 | 0.30 | ≤ 24 | **missed** |" in table[1]
    assert table[2].endswith("| ≤ 300 | not measured |  |")
    assert "| 20 objects | ms per frame | 9 (8 to 10, n=3) | 36 | 0.25 |" in details
    assert any("Tracker, 200 objects (ms per frame)" in line and "--only tracker" in line for line in lines)


def test_gpu_targets_apply_to_machines_with_a_gpu() -> None:
    tables = [page.render([machine(hardware=hardware)]) for hardware in (CPU, GPU)]
    rows = [sum("| not measured |" in line for line in text.splitlines()) for text in tables]
    of_gpu = sum(target.gpu for target in TARGETS)
    assert rows == [len(TARGETS) - of_gpu, of_gpu]
    assert "this machine has no GPU" in tables[0] and "this machine has no GPU" not in tables[1]


def test_skipped_work_and_notes_are_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "data.md").write_text("Written by hand.\n")
    claim = Claim("data", "Data", {}, records=[record("T=5, Ray Data", quantity("s", 1.0), note="Note of the script.")])
    claim.not_measured["T=30"] = "no time"
    assert "* Data, T=30: no time." in page.render([machine(claim)], tmp_path)
    text = page.render_details([machine(claim)], tmp_path)
    assert text.index("Note of the script.") < text.index("Written by hand.")


def test_record_with_points_has_a_plot_and_a_table(tmp_path: Path) -> None:
    points = ({"at": 2.0, "s": 1.0, "MB": 10.0}, {"at": 4.0, "s": 2.0, "MB": 11.0}, {"at": 8.0, "s": 4.1, "MB": 12.0})
    growth = Claim("growth", "Growth", {}, records=[record("frames", quantity("exponent of s", 1.0), points=points)])
    text = page.render_details([machine(growth)])
    assert "(pictures/growth_frames.png)" in text and "| 8 | 4.1 | 12 |" in text
    first = plots.draw([machine(growth)], tmp_path)[0]
    assert first.name == "growth_frames.png" and first.read_bytes().startswith(b"\x89PNG")
    before = first.read_bytes()
    plots.draw([machine(growth)], tmp_path)
    assert first.read_bytes() == before


def test_two_machines_have_two_tables() -> None:
    claim = Claim("video", "Video", {}, records=[record("work", quantity("s", 1.0))])
    machines = [machine(claim), machine(claim, hardware=GPU)]
    details = page.render_details(machines)
    assert page.render(machines).count("## Targets: ") == 2
    assert details.count("## Video") == 1 and details.count("**Some GPU") == 1


def test_configuration_is_on_the_page() -> None:
    """Shared entries are above the table of the records, others below it."""
    records = [
        record(name, quantity("s", 1.0), configuration={"threads": 3, "size": [4, size]})
        for name, size in (("small", 5), ("large", 50))
    ]
    lines = page.render_details([machine(Claim("video", "Video", {}, records=records))]).splitlines()
    assert any("; threads 3." in line and "size" not in line for line in lines)
    assert "*small*: size 4, 5." in lines and "*large*: size 4, 50." in lines
