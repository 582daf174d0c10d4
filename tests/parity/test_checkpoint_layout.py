"""checkpoint_layout*.json: our container is the published one; each case of the published loaders either loads with a
complete report or is an error with advice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motip.errors import MotipError
from motip.model import ModelSpec, build_model
from motip.weights import load_checkpoint, load_pretrained, save_checkpoint
from motip.weights.transfer_report import COPIED, DROPPED, INITIALISED, ROWS_MOVED, TransferReport
from tests.helpers.weight_cases import TINY, detector_logits, detector_state, save_published, tiny_model
from tests.parity.recipe import fill
from tests.parity.sizes import or_skip, present, reference_files


def cases() -> list[Any]:
    found = [
        pytest.param(name, outcome, id=f"{path.stem}: {name}")
        for path in present("checkpoint_layout*.json")
        for name, outcome in json.loads(path.read_text())["detr_pretrain_acceptance"].items()
    ]
    return or_skip(found, "checkpoint_layout*.json", 2)


@dataclass
class Case:
    """One file, the model to fill, and the expected outcome."""

    state: dict[str, Tensor]
    classes: tuple[str, ...] = ("pedestrian",)
    file_classes: tuple[str, ...] | None = None
    new_class_from: dict[str, str] = field(default_factory=dict)
    spec: ModelSpec = TINY
    error_parts: tuple[str, ...] = ()
    """Parts of the error message, if it is an error without `then`."""
    then: dict[str, Any] = field(default_factory=dict)
    """Arguments advised by the error message, with which it loads."""
    rows: dict[int, int] = field(default_factory=dict)
    """New class -> row of the file with the same logits."""
    dropped: int = 0
    identity_initialised: bool = True


def plain(name: str) -> Case:
    return Case(detector_state(tiny_model(1)), rows={0: 0})


def coco_to_one(name: str) -> Case:
    found = re.search(r"IDX=(\d+)", name)
    row = int(found.group(1)) if found else 1
    init = {"pedestrian": f"row:{row}"} if found else {}
    return Case(detector_state(tiny_model(1, num_classes=91)), new_class_from=init, rows={0: row})


def coco_to_many(name: str) -> Case:
    count = int(name.rsplit("=", 1)[1])
    names = ("car", "pedestrian", "truck", "bus", "bicycle")[:count]
    rows = dict(enumerate((3, 1, 8, 6, 2)[:count]))
    return Case(detector_state(tiny_model(1, num_classes=91)), names, rows=rows)


def some_classes(name: str) -> Case:
    old, new = (int(number) for number in re.findall(r"(\d+)-class head -> NUM_CLASSES=(\d+)", name)[0])
    names = tuple(f"class {index}" for index in range(max(old, new)))
    return Case(
        detector_state(tiny_model(1, num_classes=old)),
        names[:new],
        error_parts=(f"{old} rows", "PRETRAIN_CLASSES"),
        then={"file_classes": names[:old]},
        rows={index: index for index in range(min(old, new))},
    )


def prefixed(name: str) -> Case:
    return Case(detector_state(tiny_model(1), "detr."), rows={0: 0})


def full_checkpoint(name: str) -> Case:
    return Case(dict(tiny_model(1).state_dict()), rows={0: 0}, identity_initialised=False)


def missing_keys(name: str) -> Case:
    state = detector_state(tiny_model(1))
    gone = list(state)[: int(re.findall(r"drop (\d+)", name)[0])]
    for key in gone:
        del state[key]
    allow = ["detr." + key for key in gone]
    return Case(state, error_parts=(allow[0], "does not contain it"), then={"allow": allow})


def with_batch_counter(name: str) -> Case:
    """The only case with batch norm: a ResNet-50 with a small transformer."""
    spec = replace(TINY, backbone="resnet50")
    state = {key: tensor.clone() for key, tensor in fill(build_model(spec), 1).detr.state_dict().items()}
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(1)
    return Case(state, spec=spec, dropped=1)


def without_alias(name: str) -> Case:
    state = {key: value for key, value in detector_state(tiny_model(1)).items() if "decoder.bbox_embed" not in key}
    return Case(state, rows={0: 0})


def other_query_count(name: str) -> Case:
    old, new = (int(number) for number in re.findall(r"(\d+) vs (\d+)", name)[0])
    state = detector_state(tiny_model(1, num_queries=old))
    key = "detr.query_embed.weight"
    return Case(
        state,
        spec=replace(TINY, num_queries=new),
        error_parts=(key, f"({old}, 128) in the file, ({new}, 128) in the model", "DETR_NUM_QUERIES"),
        then={"allow": [key]},
        dropped=1,
    )


BUILDERS: tuple[tuple[str, Callable[[str], Case]], ...] = (
    (r"^no-prefix", plain),
    (r"^COCO 91 -> 1\b", coco_to_one),
    (r"^COCO 91 -> NUM_CLASSES", coco_to_many),
    (r"^\d+-class head", some_classes),
    (r"^'detr\.'-prefixed", prefixed),
    (r"^full MOTIP", full_checkpoint),
    (r"^missing keys", missing_keys),
    (r"num_batches_tracked", with_batch_counter),
    (r"^without .*alias", without_alias),
    (r"^query_embed", other_query_count),
)


@pytest.mark.parametrize(("name", "published"), cases())
def test_published_loader_case(tmp_path: Path, name: str, published: str) -> None:
    if name.startswith("load_checkpoint"):
        check_resume(tmp_path, name)
        return
    builder = next((build for pattern, build in BUILDERS if re.search(pattern, name)), None)
    assert builder is not None, f"no construction for the case '{name}'; outcome of the published code: {published}"
    case = builder(name)
    model = fill(build_model(replace(case.spec, num_classes=len(case.classes))), 2).eval()
    untouched = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    path = save_published(tmp_path / "a.pth", case.state)
    options: dict[str, Any] = {"file_classes": case.file_classes, "new_class_from": case.new_class_from}
    if case.error_parts:
        with pytest.raises(MotipError) as caught:
            load_pretrained(model, path, case.classes, **options)
        message = caught.value.render()
        assert all(words in message for words in case.error_parts), message
        assert caught.value.fix
        assert all(torch.equal(tensor, untouched[key]) for key, tensor in model.state_dict().items())
    report = load_pretrained(model, path, case.classes, **{**options, **case.then})
    check_report(report, case, model)
    if case.rows and case.spec == TINY:
        parent = tiny_model(1, num_classes=report_rows(case))
        before, after = detector_logits(parent), detector_logits(model)
        for index, row in case.rows.items():
            assert (after[..., index] - before[..., row]).abs().max() < 1e-6


def report_rows(case: Case) -> int:
    return next(value.shape[0] for key, value in case.state.items() if key.endswith("class_embed.0.weight"))


def check_report(report: TransferReport, case: Case, model: torch.nn.Module) -> None:
    counts = report.counts()
    assert sum(counts["file"].values()) == len(report.file_status) == len(case.state)
    assert sum(counts["model"].values()) == len(report.model_status) == len(model.state_dict())
    assert counts["file"][DROPPED] == case.dropped
    identity = [key for key in model.state_dict() if not key.startswith("detr.")]
    initialised = report.names(INITIALISED, "model")
    assert [key for key in initialised if not key.startswith("detr.")] == (
        identity if case.identity_initialised else []
    )
    heads = {report.model_status[f"detr.class_embed.{layer}.weight"].category for layer in range(2)}
    assert heads <= {COPIED, ROWS_MOVED}


def check_resume(tmp_path: Path, name: str) -> None:
    """Resuming: the published loader silently restores neither optimiser nor states of a detector-only checkpoint."""
    model = tiny_model(1, only_detr="only_detr" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    path = save_checkpoint(
        tmp_path / "a.pth", model=model, classes=("pedestrian",), config={}, epoch=0, step=5, optimizer=optimizer
    )
    content = load_checkpoint(path)
    assert all(torch.equal(content["model"][key], tensor) for key, tensor in model.state_dict().items())
    restored = content["optimizer"]["state"]
    assert len(restored) == len(optimizer.state) > 0
    assert content["states"] == {"start_epoch": 1, "global_step": 5}


@pytest.mark.parametrize("path", reference_files("checkpoint_layout*.json"))
def test_our_checkpoint_has_the_published_container(tmp_path: Path, path: Path) -> None:
    layout = json.loads(path.read_text())
    model = tiny_model(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    milestones = [int(epoch) for epoch in layout["scheduler"]["milestones"]]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    file = save_checkpoint(
        tmp_path / "a.pth",
        model=model,
        classes=("pedestrian",),
        config={},
        epoch=layout["states"]["start_epoch"] - 1,
        step=layout["states"]["global_step"],
        optimizer=optimizer,
        scheduler=scheduler,
    )
    content = torch.load(file, weights_only=True)
    assert set(layout["top"]) <= set(content)
    assert content["states"] == layout["states"]
    assert set(content["optimizer"]) == set(layout["optimizer_keys"])
    entry = next(iter(content["optimizer"]["state"].values()))
    assert {key: str(value.dtype) for key, value in entry.items()} == {
        key: dtype for key, (_, dtype) in layout["opt_state_entry"].items()
    }
    assert entry["step"].shape == torch.Size(layout["opt_state_entry"]["step"][0])
    assert set(content["scheduler"]) == set(layout["scheduler"])
    written = {str(epoch): count for epoch, count in content["scheduler"]["milestones"].items()}
    assert written == layout["scheduler"]["milestones"]


@pytest.mark.parametrize("path", reference_files("checkpoint_layout*.json"))
def test_the_default_model_has_the_published_number_of_entries(path: Path) -> None:
    layout = json.loads(path.read_text())
    with torch.device("meta"):
        model = build_model(ModelSpec())
    assert len(model.state_dict()) == layout["n_model"]
    assert sum(parameter.requires_grad for parameter in model.parameters()) == sum(layout["n_group"])
    assert list(model.detr.state_dict())[: len(layout["only_detr_first_keys"])] == layout["only_detr_first_keys"]
