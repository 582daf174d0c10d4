"""plan_transfer and apply_transfer: a status for every tensor, no partial loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from motip.errors import MotipError
from motip.model import MOTIP
from motip.weights import apply_transfer, load_pretrained, plan_transfer, read_weights, save_checkpoint
from motip.weights.transfer_report import COPIED, DROPPED, GROWN, INITIALISED, ROWS_MOVED, TransferReport
from tests.helpers.weight_cases import detector_state, save_published, tiny_model


def assert_complete(report: TransferReport, file_state: dict[str, Tensor], model: MOTIP) -> None:
    """Both sides list every tensor once, in a category of their side, and the counts add up."""
    assert list(report.file_status) == list(file_state)
    assert set(report.model_status) == set(model.state_dict())
    assert {status.category for status in report.file_status.values()} <= {COPIED, ROWS_MOVED, GROWN, DROPPED}
    assert {status.category for status in report.model_status.values()} <= {COPIED, ROWS_MOVED, GROWN, INITIALISED}
    counts = report.counts()
    assert sum(counts["file"].values()) == len(file_state)
    assert sum(counts["model"].values()) == len(model.state_dict())
    assert json.loads(json.dumps(report.to_dict()))["counts"] == counts
    text = report.table() + report.summary_line()
    assert all(note in text for note in report.notes)
    assert f"{len(file_state)}" in report.summary_line()


def test_full_file_is_copied_completely(tmp_path: Path) -> None:
    parent, child = tiny_model(1), tiny_model(2)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    assert_complete(report, parent.state_dict(), child)
    assert report.counts()["model"][COPIED] == len(child.state_dict())
    for key, tensor in parent.state_dict().items():
        assert torch.equal(child.state_dict()[key], tensor), key
    aliases = {key for key, status in report.model_status.items() if status.alias_of}
    assert aliases == {
        *(f"detr.bbox_embed.{i}.layers.{j}.{part}" for i in range(2) for j in range(3) for part in ("weight", "bias")),
        "id_decoder.embed_to_word_layers.1.weight",
    }
    assert any("assumed to be 'pedestrian'" in note for note in report.notes)


def test_added_class_keeps_the_identity_half_and_the_pedestrian_row(tmp_path: Path) -> None:
    """The published loader drops trajectory_modeling, id_decoder and the class head in this case."""
    parent, child = tiny_model(1), tiny_model(2, num_classes=2)
    save_checkpoint(tmp_path / "a.pth", model=parent, classes=("pedestrian",), config={}, epoch=0, step=1)
    report = load_pretrained(child, tmp_path / "a.pth", ("pedestrian", "car"))
    assert_complete(report, parent.state_dict(), child)
    before, after = parent.state_dict(), child.state_dict()
    identity = [key for key in before if key.startswith(("trajectory_modeling.", "id_decoder."))]
    assert len(identity) == len([key for key in after if key.startswith(("trajectory_modeling.", "id_decoder."))]) > 30
    for key in identity:
        assert torch.equal(after[key], before[key]), key
    for layer in range(2):
        for part in ("weight", "bias"):
            key = f"detr.class_embed.{layer}.{part}"
            assert torch.equal(after[key][0], before[key][0])
            assert report.model_status[key].category == ROWS_MOVED
    assert report.counts()["model"][INITIALISED] == 0


def test_detector_only_file_initialises_the_identity_half_with_a_note(tmp_path: Path) -> None:
    parent, child = tiny_model(1), tiny_model(2)
    untouched = {key: tensor.clone() for key, tensor in child.state_dict().items()}
    path = save_published(tmp_path / "d.pth", detector_state(parent))
    report = load_pretrained(child, path, ["pedestrian"])
    assert_complete(report, {"detr." + key: value for key, value in detector_state(parent).items()}, child)
    initialised = report.names(INITIALISED, "model")
    assert initialised == [key for key in untouched if not key.startswith("detr.")]
    for key, tensor in child.state_dict().items():
        expected = untouched[key] if key in initialised else parent.state_dict()[key]
        assert torch.equal(tensor, expected), key
    noted = [note for note in report.notes if note.startswith("DETECTOR ONLY")]
    assert len(noted) == 1 and str(len(initialised)) in noted[0]


# --- errors, and differences allowed by name ---------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]
BAD: dict[str, tuple[Change, str, str]] = {
    "missing detector tensor": (
        lambda state: state.pop("detr.transformer.level_embed"),
        "detr.transformer.level_embed",
        "does not contain it",
    ),
    "missing identity tensor of a full file": (
        lambda state: state.pop("id_decoder.cross_attn_layers.1.in_proj_bias"),
        "id_decoder.cross_attn_layers.1.in_proj_bias",
        "does not contain it",
    ),
    "unknown tensor": (
        lambda state: state.update({"detr.transformer.enc_output.weight": torch.zeros(3)}),
        "detr.transformer.enc_output.weight",
        "no such tensor",
    ),
    "other number of queries": (
        lambda state: state.update({"detr.query_embed.weight": torch.zeros(7, 128)}),
        "detr.query_embed.weight",
        r"\(7, 128\) in the file, \(10, 128\)",
    ),
    "other width of the class head": (
        lambda state: state.update({"detr.class_embed.0.weight": torch.zeros(1, 32)}),
        "detr.class_embed.0.weight",
        r"\(1, 32\)",
    ),
    "integers where weights should be": (
        lambda state: state.update({"detr.query_embed.weight": torch.zeros(10, 128, dtype=torch.int64)}),
        "detr.query_embed.weight",
        "int64 numbers",
    ),
    "another shape under a tensor's other name": (
        lambda state: state.update({"detr.transformer.decoder.bbox_embed.0.layers.0.weight": torch.zeros(3)}),
        "detr.transformer.decoder.bbox_embed.0.layers.0.weight",
        r"\(3,\), but \(64, 64\) as detr.bbox_embed.0.layers.0.weight",
    ),
    "other width of the ID embedding": (
        lambda state: state.update({"id_decoder.word_to_embed.weight": torch.zeros(32, 9)}),
        "id_decoder.word_to_embed.weight",
        r"\(32, 9\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unexpected_tensor_is_an_error_unless_allowed(tmp_path: Path, case: str) -> None:
    change, key, found = BAD[case]
    state = dict(tiny_model(1).state_dict())
    change(state)
    child = tiny_model(2)
    untouched = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    path = save_published(tmp_path / "a.pth", state)
    with pytest.raises(MotipError, match=found) as caught:
        load_pretrained(child, path, ["pedestrian"])
    assert f"key {key}" in str(caught.value.where)
    assert f"PRETRAIN_ALLOW: ['{key}']" in str(caught.value.fix)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in child.state_dict().items())

    report = load_pretrained(child, path, ["pedestrian"], allow=[key])
    assert_complete(report, state, child)
    in_file, in_model = key in state, key in untouched
    if in_file:
        assert report.file_status[key].category == DROPPED
    if in_model and "other name" not in case:
        assert report.model_status[key].category == INITIALISED
        assert torch.equal(child.state_dict()[key], untouched[key])


def test_error_names_the_first_problem_and_counts_all(tmp_path: Path) -> None:
    state = {key: value for key, value in tiny_model(1).state_dict().items() if "cross_attn_norm" not in key}
    with pytest.raises(MotipError, match="and 3 more") as caught:
        load_pretrained(tiny_model(2), save_published(tmp_path / "a.pth", state), ["pedestrian"])
    assert "key id_decoder.cross_attn_norm_layers.0.weight" in str(caught.value.where)


def test_full_file_into_a_detector_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = save_published(tmp_path / "a.pth", tiny_model(1))
    detector = tiny_model(2, only_detr=True)
    with pytest.raises(MotipError, match="no such tensor"):
        load_pretrained(detector, path, ["pedestrian"])
    report = load_pretrained(detector, path, ["pedestrian"], allow=["trajectory_modeling.*", "id_decoder.*", "typo.*"])
    assert report.counts()["model"][COPIED] == len(detector.state_dict())
    assert any("not needed: typo.*" in note for note in report.notes)


def test_batch_norm_counters_are_dropped_and_counted(tmp_path: Path) -> None:
    state = dict(tiny_model(1).state_dict())
    state["detr.backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(7)
    child = tiny_model(2)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", state), ["pedestrian"])
    assert report.names(DROPPED, "file") == ["detr.backbone.0.body.bn1.num_batches_tracked"]
    assert_complete(report, state, child)


def test_applying_to_another_architecture_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    file = read_weights(save_published(tmp_path / "a.pth", tiny_model(1)))
    plan = plan_transfer(file, tiny_model(2).spec, ["pedestrian"])
    other = tiny_model(2, num_queries=12)
    untouched = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(MotipError, match="architecture") as caught:
        apply_transfer(other, plan)
    assert caught.value.where == "detr.query_embed.weight"
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in other.state_dict().items())


# --- tensors with two names -----------------------------------------------------------------------


def test_last_of_several_label_heads_fills_a_shared_head_with_a_note(tmp_path: Path) -> None:
    parent = tiny_model(1, use_aux_loss=True, use_shared_aux_head=False)
    parent.id_decoder.embed_to_word_layers[0].weight.data.zero_()  # type: ignore[union-attr]
    state = parent.state_dict()
    child = tiny_model(2)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", state), ["pedestrian"])
    first, last = (f"id_decoder.embed_to_word_layers.{layer}.weight" for layer in range(2))
    assert torch.equal(child.state_dict()[first], state[last])
    assert report.file_status[first].category == DROPPED and report.file_status[last].category == COPIED
    assert report.model_status[first].category == report.model_status[last].category == COPIED
    assert any(last in note and "wins" in note for note in report.notes)
    assert_complete(report, state, child)
    # as load_state_dict does with the same file
    reference = tiny_model(3)
    reference.load_state_dict(state)
    assert torch.equal(reference.state_dict()[first], child.state_dict()[first])


def test_a_shared_head_fills_distinct_ones(tmp_path: Path) -> None:
    parent, child = tiny_model(1), tiny_model(2, use_aux_loss=True, use_shared_aux_head=False)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    heads = [child.state_dict()[f"id_decoder.embed_to_word_layers.{layer}.weight"] for layer in range(2)]
    assert torch.equal(heads[0], heads[1]) and heads[0].data_ptr() != heads[1].data_ptr()
    assert_complete(report, parent.state_dict(), child)


@pytest.mark.parametrize("absent", ["detr.bbox_embed.", "detr.transformer.decoder.bbox_embed."])
def test_one_name_of_an_aliased_tensor_is_enough(tmp_path: Path, absent: str) -> None:
    parent, child = tiny_model(1), tiny_model(2)
    state = {key: value for key, value in parent.state_dict().items() if not key.startswith(absent)}
    report = load_pretrained(child, save_published(tmp_path / "a.pth", state), ["pedestrian"])
    assert_complete(report, state, child)
    for key, tensor in parent.state_dict().items():
        assert torch.equal(child.state_dict()[key], tensor), key
    filled = [key for key, status in report.model_status.items() if "other name" in status.detail]
    assert filled == [key for key in parent.state_dict() if key.startswith(absent)]


def test_equal_box_heads_give_a_note(tmp_path: Path) -> None:
    state = detector_state(tiny_model(1))
    for key in [key for key in state if "bbox_embed.1." in key]:
        state[key] = state[key.replace("bbox_embed.1.", "bbox_embed.0.")].clone()
    report = load_pretrained(tiny_model(2), save_published(tmp_path / "a.pth", state), ["pedestrian"])
    assert any("without box refinement" in note for note in report.notes)


def test_half_precision_file_is_converted_to_float32_with_a_note(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in tiny_model(1).state_dict().items()}
    child = tiny_model(2, num_classes=2, num_id_vocabulary=20)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", state), ["pedestrian", "car"])
    assert {tensor.dtype for tensor in child.state_dict().values()} == {torch.float32}
    words = child.state_dict()["id_decoder.word_to_embed.weight"]
    assert torch.equal(words[:, :8], state["id_decoder.word_to_embed.weight"][:, :8].float())
    assert any("16 bits" in note for note in report.notes)


def test_table_lists_tensors_that_are_not_copied(tmp_path: Path) -> None:
    child = tiny_model(2, num_classes=2, num_id_vocabulary=20, rel_pe_length=9)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", tiny_model(1)), ["car", "pedestrian"])
    table = report.table()
    for line in ("car <- prior", "pedestrian <- row 0", "8 -> 20 labels", "6 -> 9 time steps", "the last row repeated"):
        assert line in table
    assert all(len(line) < 200 for line in table.splitlines())


def test_spec_and_class_names_must_agree(tmp_path: Path) -> None:
    file = read_weights(save_published(tmp_path / "a.pth", tiny_model(1)))
    with pytest.raises(MotipError, match="names 2 classes, but the class head has 1 rows"):
        plan_transfer(file, replace(tiny_model(1).spec), ["pedestrian", "car"])


def test_skipped_tensors_keep_their_initialisation(tmp_path: Path) -> None:
    parent, child = tiny_model(1), tiny_model(2)
    fresh = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    path = save_published(tmp_path / "a.pth", parent)
    weights = read_weights(path)
    skip = ["trajectory_modeling.*", "id_decoder.*", "detr.class_embed.*", "typo.*"]
    report = apply_transfer(child, plan_transfer(weights, child.spec, ["pedestrian"], skip=skip))
    assert_complete(report, parent.state_dict(), child)
    skipped = [name for name in fresh if name.startswith(("trajectory_modeling", "id_decoder", "detr.class_embed"))]
    assert len(skipped) > 20
    for name, tensor in child.state_dict().items():
        expected = fresh[name] if name in skipped else parent.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert {report.file_status[name].category for name in skipped} == {DROPPED}
    assert {report.model_status[name].category for name in skipped} == {INITIALISED}
    assert any("no effect" in note and "typo.*" in note for note in report.notes)
    assert not any("DETECTOR ONLY" in note for note in report.notes)


def test_a_skipped_identity_half_of_another_size_is_no_error(tmp_path: Path) -> None:
    parent = dict(tiny_model(1).state_dict())
    parent["id_decoder.word_to_embed.weight"] = torch.zeros(32, 9)
    child = tiny_model(2)
    path = save_published(tmp_path / "a.pth", parent)
    plan = plan_transfer(read_weights(path), child.spec, ["pedestrian"], skip=["id_decoder.*"])
    assert plan.report.model_status["id_decoder.word_to_embed.weight"].category == INITIALISED
    others = [name for name in parent if not name.startswith("id_decoder.")]
    assert {plan.report.model_status[name].category for name in others} == {COPIED}
