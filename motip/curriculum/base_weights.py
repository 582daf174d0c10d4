"""Initial weights of a stage: best checkpoint of an earlier stage, a given file, or fresh initialisation."""

from __future__ import annotations

from pathlib import Path

from motip.config import Curriculum, Stage, load_config
from motip.curriculum.options import Options
from motip.errors import MotipError
from motip.lineage.record_file import read_record, record_fresh, record_path_of
from motip.model import ModelSpec
from motip.stage_folder import StageRecord
from motip.storage.atomic import digest
from motip.storage.paths import Location, atomic_output, local_copy, location, sha256
from motip.train.setup import fresh_model
from motip.train.stage_job import Parent
from motip.weights import plan_transfer, read_weights, save_checkpoint


def check_given_weights(curriculum: Curriculum, options: Options) -> None:
    """Validate the given weights files before the conversion starts, which may take hours.

    Raises:
        MotipError: a file is missing or damaged, does not fit the stage's model, or its lineage record does not match.
    """
    for stage in curriculum.stages:
        if curriculum.parent_of(stage) is None and not stage.initialise:
            named = stage.weights or stage.config.DETR_PRETRAIN
            if named:
                path = local_copy(_find_weights(named, stage, options))
                weights = read_weights(path, classes=stage.config.PRETRAIN_CLASSES)
                plan_transfer(
                    weights,
                    ModelSpec.from_config(stage.config),
                    stage.config.class_names,
                    new_class_from=stage.config.CLASS_INIT,
                    allow=stage.config.PRETRAIN_ALLOW,
                    skip=stage.config.PRETRAIN_SKIP,
                )
                read_record(_find_weights(named, stage, options), weights.sha256)


def _find_weights(named: str, stage: Stage, options: Options) -> Location:
    """Path of a weights file: absolute, under the data root, beside the curriculum file, or in the working directory.

    Raises:
        MotipError: the file is in none of these places.
    """
    candidates: list[Location] = [location(named)]
    if isinstance(candidates[0], Path) and not candidates[0].is_absolute():
        beside = Path(options.config_path).expanduser().resolve().parent
        candidates = [location(options.data_root) / named.removeprefix("./"), beside / named, Path.cwd() / named]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MotipError(
        f"the weights that stage {stage.name} starts from do not exist",
        where=f"DETR_PRETRAIN of {stage.config.name} ({stage.config.origin('DETR_PRETRAIN')})"
        if stage.weights is None
        else f"weights of stage {stage.name} in {options.config_path or 'the curriculum file'}",
        found=named,
        expected=" or ".join(str(candidate) for candidate in candidates),
        fix="put the file there (the MOTIP model zoo calls it r50_deformable_detr_motip_dancetrack.pth), "
        "or name another one in `weights:`",
    )


def parent_of(curriculum: Curriculum, stage: Stage, records: list[StageRecord], options: Options) -> Parent | None:
    """Weights the stage starts from: an earlier stage's best checkpoint, a given file, fresh weights, or None."""
    earlier = curriculum.parent_of(stage)
    if earlier is not None:
        record = next(record for record in records if record.stage == earlier.name)
        return Parent(record.checkpoint, record.sha256, record.run_id, record.stage)
    if stage.initialise:
        path = fresh_weights(stage, options)
    elif stage.weights or stage.config.DETR_PRETRAIN:
        path = _find_weights(str(stage.weights or stage.config.DETR_PRETRAIN), stage, options)
    else:
        return None
    return Parent(str(path), sha256(path))


def fresh_weights(stage: Stage, options: Options) -> Location:
    """Path of the freshly initialised weights of the configuration named by `initialise`; created once per storage."""
    config = load_config(str(stage.initialise))
    spec = ModelSpec.from_config(config)
    identity = digest({"spec": spec.to_dict(), "seed": config.SEED, "classes": config.class_names})
    path = location(options.storage) / "weights" / f"{config.name}_{identity[:12]}.pth"
    record = record_path_of(path)
    if not path.is_file():
        record.unlink(missing_ok=True)  # it belongs to weights that were deleted
        with atomic_output(path) as temporary:
            save_checkpoint(
                temporary,
                model=fresh_model(config),
                classes=config.class_names,
                config=config.to_dict(),
                epoch=-1,
                step=0,
            )
    # Separate check: a run may have been killed between writing weights and record.
    if not record.is_file():
        record_fresh(path, sha256(path), config.SEED)
    return path
