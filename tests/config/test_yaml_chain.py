"""YAML chains: inheritance, overrides, precedence and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from motip.config import Config, load_config, without_effect_message
from motip.errors import MotipError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_child_overrides_parent_and_origin_names_the_line(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "LR: 1.0e-4\nEPOCHS: 7\n")
    leaf = write(tmp_path / "leaf.yaml", "SUPER_CONFIG_PATH: base.yaml\n\nLR: 3.0e-5\n")
    config = load_config(leaf)
    assert (config.LR, config.EPOCHS, config.name) == (3.0e-5, 7, "leaf")
    assert config.origin("LR") == f"{leaf}:3"
    assert config.origin("EPOCHS").endswith("base.yaml:2")
    assert config.origin("SEED") == "default"


def test_a_path_relative_to_the_repository_root_works_from_any_directory(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(repo_root / "configs" / "bdd_stage2.yaml")
    assert config.DETR_ENC_LAYERS == 6 and config.NUM_CLASSES == 2


def test_overrides_take_precedence_and_set_keys_of_blocks(tmp_path: Path) -> None:
    leaf = write(tmp_path / "leaf.yaml", "LR: 1.0e-4\n")
    config = load_config(leaf, ["LR=2e-5", "val_config.SPLIT_TO_EVAL=test", "sampler_lengths=[2, 4]"])
    assert config.LR == 2.0e-5
    assert config.val_config.SPLIT_TO_EVAL == "test"
    assert config.clip_schedule(0).lengths == (2, 4)


@pytest.mark.parametrize(
    ("base", "leaf", "milestones"),
    [
        ("SCHEDULER_MILESTONES: [6, 9]\n", "LR_DROP: 15\n", [15]),
        ("LR_DROP: 15\n", "SCHEDULER_MILESTONES: [6, 9]\n", [6, 9]),
    ],
)
def test_the_equivalent_key_nearest_the_leaf_takes_precedence(
    tmp_path: Path, base: str, leaf: str, milestones: list[int]
) -> None:
    write(tmp_path / "base.yaml", base)
    path = write(tmp_path / "leaf.yaml", "SUPER_CONFIG_PATH: base.yaml\n" + leaf)
    assert load_config(path).lr_milestones == milestones


def test_sampler_lengths_alone_keep_the_published_interval_rule(tmp_path: Path) -> None:
    path = write(tmp_path / "leaf.yaml", "sampler_lengths: [2]\n")
    schedule = load_config(path).clip_schedule(3)
    assert (schedule.lengths, schedule.intervals, schedule.max_interval) == ((2,), None, 4)


@pytest.mark.parametrize(
    ("base", "leaf", "expected"),
    [
        ("sample_intervals: [1, 2]\n", "sample_interval_seconds: [0.2, 1]\n", (None, None, (0.2, 1.0))),
        ("SAMPLE_INTERVALS: [3]\n", "sample_interval_seconds: [0.4]\n", (None, None, (0.4,))),
        ("sample_interval_seconds: [0.4]\n", "sample_intervals: [2]\n", ((2,), None, None)),
        ("sample_interval_seconds: [0.4]\n", "SAMPLE_INTERVALS: [3]\n", (None, 3, None)),
    ],
)
def test_intervals_in_seconds_and_in_frames_are_one_setting(
    tmp_path: Path, base: str, leaf: str, expected: tuple[object, ...]
) -> None:
    write(tmp_path / "base.yaml", base)
    schedule = load_config(write(tmp_path / "leaf.yaml", "SUPER_CONFIG_PATH: base.yaml\n" + leaf)).clip_schedule(0)
    assert (schedule.intervals, schedule.max_interval, schedule.interval_seconds) == expected
    with pytest.raises(MotipError, match="are the same setting"):
        load_config(write(tmp_path / "both.yaml", base + leaf))


@pytest.mark.parametrize("value", ["[]", "[0]", "[-1.0]", "[.inf]", "[.nan]"])
def test_intervals_in_seconds_must_be_positive(tmp_path: Path, value: str) -> None:
    with pytest.raises(MotipError, match="sample_interval_seconds"):
        load_config(write(tmp_path / "leaf.yaml", f"sample_interval_seconds: {value}\n"))


def test_published_schedule_changes_at_its_epochs(tmp_path: Path) -> None:
    text = "SAMPLE_STEPS: [0, 4]\nSAMPLE_LENGTHS: [3, 5]\nSAMPLE_INTERVALS: [4, 2]\n"
    config = load_config(write(tmp_path / "leaf.yaml", text))
    assert [config.clip_schedule(epoch).lengths for epoch in (0, 3, 4)] == [(3,), (3,), (5,)]
    assert config.clip_schedule(9).max_interval == 2


def test_absolute_backbone_rate_is_converted_to_a_fraction(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "leaf.yaml", "LR: 2.0e-5\nLR_BACKBONE: 1.0e-6\n"))
    assert config.backbone_lr_scale == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "LR: 1\nsampler_length: [3]\n",
            ("unknown configuration key sampler_length", "leaf.yaml:2", "sampler_lengths"),
        ),
        ("val_config:\n  GT_FOLDR: x\n", ("val_config.GT_FOLDR", "leaf.yaml:1", "val_config.GT_FOLDER")),
        ("LR: fast\n", ("LR", "leaf.yaml:1", "'fast'")),
        ("LR: 1\nLR: 2\n", ("twice", "leaf.yaml:2")),
        ("LR_DROP: 3\nSCHEDULER_MILESTONES: [6]\n", ("LR_DROP and SCHEDULER_MILESTONES", "leaf.yaml")),
        ("NUM_CLASSES: 3\n", ("not named", "CLASSES", "leaf.yaml:1")),
        ("NUM_CLASSES: 2\nCLASSES: [pedestrian]\n", ("does not match", "CLASSES")),
        ("sampler_lengths: [31]\n", ("REL_PE_LENGTH", "leaf.yaml:1")),
        ("AUG_RANDOM_CROP_MIN: 700\n", ("smallest crop", "leaf.yaml:1")),
        ("SUPER_CONFIG_PATH: nowhere.yaml\n", ("file not found", "leaf.yaml:1", "nowhere.yaml")),
        ("LR: [1\n", ("not valid YAML", "leaf.yaml")),
        ("- LR\n", ("KEY: value",)),
    ],
)
def test_errors_name_the_line_and_a_fix(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    leaf = write(tmp_path / "leaf.yaml", text)
    with pytest.raises(MotipError) as caught:
        load_config(leaf)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\xfe\x80", b"LR: 1\n# caf\xe9\n", b"\x80\x02}q\x00."])
def test_a_binary_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    leaf = tmp_path / "leaf.yaml"
    leaf.write_bytes(content)
    with pytest.raises(MotipError, match="the file is not text") as caught:
        load_config(leaf)
    assert caught.value.where == leaf


def test_a_cyclic_chain_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SUPER_CONFIG_PATH: b.yaml\n")
    write(tmp_path / "b.yaml", "SUPER_CONFIG_PATH: a.yaml\n")
    with pytest.raises(MotipError, match="cyclic"):
        load_config(tmp_path / "a.yaml")


def test_a_bare_no_is_parsed_as_a_precision(tmp_path: Path) -> None:
    leaf = write(tmp_path / "leaf.yaml", "MIXED_PRECISION: no\n")
    assert load_config(leaf).MIXED_PRECISION == "no"
    bf16 = write(tmp_path / "bf16.yaml", "MIXED_PRECISION: bf16\n")
    assert load_config(bf16, ["MIXED_PRECISION=no"]).MIXED_PRECISION == "no"
    assert load_config(bf16, ["MIXED_PRECISION='no'"]).MIXED_PRECISION == "no"
    assert load_config(bf16, ["MIXED_PRECISION=null"]).MIXED_PRECISION is None
    with pytest.raises(MotipError, match="MIXED_PRECISION"):
        load_config(bf16, ["MIXED_PRECISION=yes"])


def test_configs_round_trip_through_dicts(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "leaf.yaml", "LR: 2.0e-5\nsample_intervals: [1, 2]\n"))
    copy = Config.from_dict(config.to_dict())
    assert copy.to_dict() == config.to_dict() and copy.name == "leaf" and copy.digest() == config.digest()
    assert config.replaced(LR=1.0).digest() != config.digest()


def test_keys_without_effect_are_listed_if_set(tmp_path: Path) -> None:
    defaults = load_config(write(tmp_path / "defaults.yaml", "LR: 1\nUSE_WANDB: False\nEXP_OWNER:\n"))
    changed = load_config(write(tmp_path / "changed.yaml", "USE_WANDB: True\nEXP_OWNER: me\n"))
    assert without_effect_message(defaults) is None
    message = without_effect_message(changed)
    assert message is not None and "USE_WANDB" in message and "EXP_OWNER" in message
