"""read_weights: kinds of files, and errors for invalid files."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from motip.errors import MotipError
from motip.weights import load_pretrained, read_weights, save_checkpoint
from motip.weights.class_names import coco_row_names
from tests.helpers.weight_cases import detector_state, save_published, tiny_model


def test_full_published_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    file = read_weights(save_published(tmp_path / "motip.pth", model))
    assert file.kind == "motip"
    assert file.has_identity
    assert list(file.tensors) == list(model.state_dict())
    assert file.classes == ("pedestrian",) and file.classes_origin == "assumed from one row"
    assert file.meta["states"] == {"start_epoch": 3, "global_step": 9}


@pytest.mark.parametrize("prefix", ["", "detr.", "module.", "module.detr."])
def test_detector_only_with_any_prefix_gets_full_keys(tmp_path: Path, prefix: str) -> None:
    model = tiny_model()
    file = read_weights(save_published(tmp_path / "detector.pth", detector_state(model, prefix)))
    assert file.kind == "detector"
    assert not file.has_identity
    assert set(file.tensors) == {key for key in model.state_dict() if key.startswith("detr.")}
    assert any("module." in note for note in file.notes) == prefix.startswith("module.")


def test_coco_file_is_detected_by_91_rows_and_named_by_category_id(tmp_path: Path) -> None:
    state = detector_state(tiny_model(num_classes=91))
    path = tmp_path / "r50_deformable_detr_plus_iterative_bbox_refinement-checkpoint.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)  # as in the official file
    file = read_weights(path)
    assert file.kind == "coco"
    assert file.classes is not None and len(file.classes) == 91
    assert (file.classes[1], file.classes[3], file.classes[16], file.classes[90]) == (
        "person",
        "car",
        "bird",
        "toothbrush",
    )
    assert file.classes[0] == file.classes[12] == ""


def test_the_80_coco_ids() -> None:
    rows = coco_row_names()
    named = [name for name in rows if name]
    assert len(rows) == 91 and len(named) == len(set(named)) == 80
    assert {row for row, name in enumerate(rows) if not name} == {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (rows[1], rows[3], rows[16], rows[90]) == ("person", "car", "bird", "toothbrush")


def test_bare_state_dict_and_old_torch_format(tmp_path: Path) -> None:
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("bare.pth", "old.pth"):
        file = read_weights(tmp_path / name)
        assert file.kind == "motip"
        assert torch.equal(file.tensors["detr.query_embed.weight"], model.state_dict()["detr.query_embed.weight"])


def test_own_checkpoint_names_its_classes(tmp_path: Path) -> None:
    model = tiny_model(num_classes=2)
    save_checkpoint(tmp_path / "a.pth", model=model, classes=("car", "pedestrian"), config={}, epoch=0, step=5)
    file = read_weights(tmp_path / "a.pth")
    assert (file.kind, file.classes, file.classes_origin) == ("ours", ("car", "pedestrian"), "file")
    with pytest.raises(MotipError, match="PRETRAIN_CLASSES contradicts"):
        read_weights(tmp_path / "a.pth", classes=("pedestrian", "car"))


def test_safetensors_without_our_header(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(detector_state(tiny_model()), tmp_path / "detector.safetensors")
    file = read_weights(tmp_path / "detector.safetensors")
    assert (file.kind, file.has_identity) == ("safetensors", False)


def test_given_class_names_must_fit_the_head(tmp_path: Path) -> None:
    path = save_published(tmp_path / "two.pth", tiny_model(num_classes=2))
    assert read_weights(path).classes is None
    assert read_weights(path, classes=("pedestrian", "car")).classes == ("pedestrian", "car")
    for wrong in (("pedestrian",), ("car", "Car"), ("a", "b", "c")):
        with pytest.raises(MotipError, match="class"):
            read_weights(path, classes=wrong)


# --- invalid files ------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.target}",)


def test_pickle_that_would_run_code_is_an_error_and_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it_ran"
    torch.save({"model": tiny_model().state_dict(), "extra": _Bomb(trace)}, tmp_path / "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Bomb(trace)))
    for name in ("bomb.pth", "raw.pth"):
        with pytest.raises(MotipError, match="would run code") as caught:
            read_weights(tmp_path / name)
        assert "system" in str(caught.value.found)
        assert name in str(caught.value.where)
    assert not trace.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 0.9999])
def test_truncated_file_is_an_error(tmp_path: Path, share: float, new_format: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"model": tiny_model().state_dict()}, path, _use_new_zipfile_serialization=new_format)
    complete = path.read_bytes()
    path.write_bytes(complete[: int(len(complete) * share)])
    with pytest.raises(MotipError, match="truncated") as caught:
        read_weights(path)
    assert "cut.pth" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"hello world", b"# MOTIP\n", bytes(100), b"garbage" * 40, b"\x80\x02x", pickle.dumps({"a": 1})[:-3]]
)
def test_error_for_other_files_does_not_advise_unsafe_loading(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "none.pth"
    path.write_bytes(content)
    with pytest.raises(MotipError, match="truncated, damaged, or not a weights file") as caught:
        read_weights(path)
    assert caught.value.found == f"{len(content)} bytes that start with {content[:16]!r}"
    assert "weights_only" not in str(caught.value)


def test_truncated_safetensors_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "cut.safetensors"
    save_file(detector_state(tiny_model()), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(MotipError, match="truncated"):
        read_weights(path)


def test_missing_file_folder_and_text_file(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="does not exist"):
        read_weights(tmp_path / "PATH_TO_STAGE_1_CHECKPOINT.pth")
    with pytest.raises(MotipError, match="folder"):
        read_weights(tmp_path)
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(MotipError):
        read_weights(tmp_path / "page.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2, 3], "contains no model weights"),
        (torch.zeros(3), "contains no model weights"),
        ({}, "contains no model weights"),
        ({"model": {}}, "contains no model weights"),
        ({"model": [torch.zeros(1)]}, "contains no model weights"),
        ({"model": {3: torch.zeros(1)}}, "contains no model weights"),
        ({"epoch": 3}, "not a tensor"),
        ({"model": {"class_embed.0.weight": "text"}}, "not a tensor"),
    ],
)
def test_wrong_container_is_an_error(tmp_path: Path, content: object, reason: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(MotipError, match=reason):
        read_weights(tmp_path / "x.pth")


def test_state_dict_of_another_model_is_an_error_that_names_its_first_key(tmp_path: Path) -> None:
    resnet = {"conv1.weight": torch.zeros(2), "layer1.0.conv1.weight": torch.zeros(2)}
    detr = {
        "transformer.encoder.layers.0.self_attn.in_proj_weight": torch.zeros(2),
        "class_embed.weight": torch.zeros(2),
    }
    for state, first in ((resnet, "conv1.weight"), (detr, "class_embed.weight")):
        torch.save({"model": state}, tmp_path / "other.pth")
        with pytest.raises(MotipError, match="another model") as caught:
            read_weights(tmp_path / "other.pth")
        assert str(caught.value.found).endswith(first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_an_error_that_names_the_key(tmp_path: Path, value: float) -> None:
    state = tiny_model().state_dict()
    state["id_decoder.word_to_embed.weight"][3, 2] = value
    with pytest.raises(MotipError, match="NaN or infinity") as caught:
        read_weights(save_published(tmp_path / "nan.pth", state))
    assert "id_decoder.word_to_embed.weight" in str(caught.value.where)
    assert str(caught.value.found).startswith("1 of ")


def test_class_list_that_contradicts_the_head_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": tiny_model(num_classes=2).state_dict(), "classes": ["pedestrian"], "config": {}}, path)
    with pytest.raises(MotipError, match="names 1 classes, but the class head has 2 rows") as caught:
        read_weights(path)
    assert str(caught.value.where) == f"{path}, classes"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("form", ["sparse", "meta"])
def test_sparse_or_meta_tensor_is_an_error_that_names_the_key(tmp_path: Path, form: str) -> None:
    state = dict(tiny_model().state_dict())
    key = "id_decoder.rel_pos_embeds"
    state[key] = state[key].to_sparse() if form == "sparse" else state[key].to("meta")
    with pytest.raises(MotipError, match="unsupported form") as caught:
        read_weights(save_published(tmp_path / "a.pth", state))
    assert f"key {key}" in str(caught.value.where) and form in str(caught.value.found)


def test_class_head_without_rows_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    state = dict(tiny_model(num_classes=2).state_dict())
    state["detr.class_embed.0.weight"] = torch.tensor(1.0)
    with pytest.raises(MotipError, match="different numbers of rows") as caught:
        read_weights(save_published(tmp_path / "a.pth", state))
    assert "detr.class_embed." in str(caught.value.where)


@pytest.mark.parametrize("fault", ["truncated", "code", "other model", "nan", "classes"])
def test_invalid_file_leaves_the_model_unchanged(tmp_path: Path, fault: str) -> None:
    model, path = tiny_model(2), tmp_path / "a.pth"
    state, content = dict(tiny_model(1).state_dict()), {}
    if fault == "nan":
        state["id_decoder.rel_pos_embeds"] = torch.full_like(state["id_decoder.rel_pos_embeds"], float("nan"))
    elif fault == "other model":
        state = {"conv1.weight": torch.zeros(2)}
    elif fault == "code":
        content = {"extra": _Bomb(tmp_path / "it_ran")}
    elif fault == "classes":
        content = {"classes": ["pedestrian", "car"], "config": {}}
    torch.save({"model": state, **content}, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(MotipError) as caught:
        load_pretrained(model, path, ["pedestrian"])
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_class_heads_with_different_rows_are_an_error(tmp_path: Path) -> None:
    state = tiny_model(num_classes=2).state_dict()
    state["detr.class_embed.1.bias"] = torch.zeros(3)
    with pytest.raises(MotipError, match="different numbers of rows") as caught:
        read_weights(save_published(tmp_path / "a.pth", state))
    assert "detr.class_embed.1.bias" in str(caught.value.where)
