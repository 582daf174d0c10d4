"""Validation rules across configuration keys; each error names the key to change."""

from __future__ import annotations

from typing import Any

from motip.errors import MotipError


def check(values: dict[str, Any]) -> None:
    """Check ``values`` (every key of a Config to its value).

    Raises:
        MotipError: for the first rule that is violated.
    """
    _check_lists(values)
    _check_schedule(values)
    _check_crop(values)
    _check_network(values)
    _check_classes(values)
    _check_clip_fits_memory(values)


def _check_lists(values: dict[str, Any]) -> None:
    for key in ("AUG_RESIZE_SCALES", "AUG_RANDOM_RESIZE", "sampler_lengths", "sample_intervals", "SAMPLE_LENGTHS"):
        may_be_empty = key == "AUG_RANDOM_RESIZE"
        if values[key] is not None and min(values[key], default=1 if may_be_empty else 0) < 1:
            raise MotipError("the value must be a list of positive numbers", where=key, found=list(values[key]))
    seconds = values["sample_interval_seconds"]
    if seconds is not None and (not seconds or not all(0 < value < float("inf") for value in seconds)):
        raise MotipError(
            "the value must be a list of positive numbers", where="sample_interval_seconds", found=list(seconds)
        )


def _check_schedule(values: dict[str, Any]) -> None:
    steps = values["SAMPLE_STEPS"]
    if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
        raise MotipError("the epochs must start at 0 and increase", where="SAMPLE_STEPS", found=list(steps))
    for key, other in (("SAMPLE_LENGTHS", "sampler_lengths"), ("SAMPLE_INTERVALS", "sample_intervals")):
        if key == "SAMPLE_INTERVALS" and values["sample_interval_seconds"] is not None:
            continue
        if values[key] is None and values[other] is None:
            raise MotipError(f"neither {key} nor {other} is set", where=key, fix=f"set {other}, e.g. [1, 2]")
        if values[key] is not None and values[other] is None and len(values[key]) != len(steps):
            raise MotipError(
                f"{key} must have one entry per entry of SAMPLE_STEPS",
                where=key,
                found=f"{len(values[key])} entries",
                expected=f"{len(steps)}",
            )


def _check_crop(values: dict[str, Any]) -> None:
    low, high = values["AUG_RANDOM_CROP_MIN"], values["AUG_RANDOM_CROP_MAX"]
    if low > high:
        raise MotipError(
            "the smallest crop is larger than the largest",
            where="AUG_RANDOM_CROP_MIN",
            found=f"{low} > AUG_RANDOM_CROP_MAX {high}",
            fix="lower AUG_RANDOM_CROP_MIN",
        )


def _check_network(values: dict[str, Any]) -> None:
    # widths
    if values["FEATURE_DIM"] != values["DETR_HIDDEN_DIM"]:
        raise MotipError(
            "the ID decoder takes the detector's outputs without a projection",
            where="FEATURE_DIM",
            found=f"{values['FEATURE_DIM']}, DETR_HIDDEN_DIM {values['DETR_HIDDEN_DIM']}",
            expected="equal values",
        )
    if (values["FEATURE_DIM"] + values["ID_DIM"]) % values["HEAD_DIM"]:
        raise MotipError(
            "FEATURE_DIM + ID_DIM must be a multiple of HEAD_DIM",
            where="HEAD_DIM",
            found=f"{values['FEATURE_DIM']} + {values['ID_DIM']} with HEAD_DIM {values['HEAD_DIM']}",
        )
    if values["DETR_HIDDEN_DIM"] % values["DETR_NUM_HEADS"]:
        raise MotipError(
            "DETR_HIDDEN_DIM must be a multiple of DETR_NUM_HEADS",
            where="DETR_NUM_HEADS",
            found=f"{values['DETR_HIDDEN_DIM']} with {values['DETR_NUM_HEADS']} heads",
        )

    # ID labels
    training_ids = values["NUM_TRAINING_IDS"]
    if training_ids is not None and training_ids > values["NUM_ID_VOCABULARY"]:
        raise MotipError(
            "NUM_TRAINING_IDS cannot exceed NUM_ID_VOCABULARY",
            where="NUM_TRAINING_IDS",
            found=training_ids,
            expected=f"at most {values['NUM_ID_VOCABULARY']}",
        )


def _check_classes(values: dict[str, Any]) -> None:
    # names
    count = values["NUM_CLASSES"]
    names = values["CLASSES"]
    key = "CLASSES"
    if names is None and values["val_config"].CLASS_NAME_TO_ID:
        table = values["val_config"].CLASS_NAME_TO_ID
        key = "val_config.CLASS_NAME_TO_ID"
        if sorted(table.values()) != list(range(1, len(table) + 1)):
            raise MotipError("class ids in result files must be 1, 2, … without gaps", where=key, found=table)
        names = tuple(table)
    if names is None and count > 2:
        raise MotipError(
            f"NUM_CLASSES is {count}, but the classes are not named",
            where="NUM_CLASSES",
            fix="set CLASSES: [pedestrian, car, …] or val_config.CLASS_NAME_TO_ID",
        )
    if names is not None and (len(names) != count or len(set(names)) != len(names)):
        raise MotipError(
            "NUM_CLASSES does not match the class names",
            where=key,
            found=f"{len(names)} names ({', '.join(names)})",
            expected=f"{count} different names",
            fix="change NUM_CLASSES or the names",
        )

    # classes to evaluate
    known = names or ("pedestrian", "car")[:count]
    unknown = [name for name in values["val_config"].CLASSES_TO_EVAL or () if name not in known]
    if unknown:
        raise MotipError(
            f"classes to evaluate are not trained: {', '.join(unknown)}",
            where="val_config.CLASSES_TO_EVAL",
            expected=f"some of {', '.join(known)}",
        )


def _check_clip_fits_memory(values: dict[str, Any]) -> None:
    lengths = values["sampler_lengths"] or values["SAMPLE_LENGTHS"] or (1,)
    if not values["ONLY_DETR"] and max(lengths) > values["REL_PE_LENGTH"]:
        raise MotipError(
            "clips are longer than the ID decoder's table of relative positions",
            where="sampler_lengths" if values["sampler_lengths"] else "SAMPLE_LENGTHS",
            found=f"{max(lengths)} frames, REL_PE_LENGTH {values['REL_PE_LENGTH']}",
            fix="raise REL_PE_LENGTH (the table grows by repeating its last row) or shorten the clips",
        )
