"""Configuration keys: type, default and meaning. The names are those of the training plan and the published code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from motip.config.rules import check
from motip.errors import MotipError
from motip.storage.atomic import digest

_active_recorders: list[set[str]] = []

WITHOUT_EFFECT: dict[str, str] = {
    "INFERENCE_MODEL": "pass the checkpoint to motip track or ray_jobs/evaluate.py on the command line",
    "INFERENCE_DATASET": "the curriculum's sources are evaluated",
    "INFERENCE_SPLIT": "stages are validated on the val split; ray_jobs/evaluate.py takes --split",
    "INFERENCE_MODE": "labelled splits are scored, unlabelled ones only tracked",
    "INFERENCE_GROUP": "results are written to the stage's folder",
    "INFERENCE_ONLY_DETR": "use motip track with any checkpoint that contains the ID decoder",
    "RESUME_MODEL": "an interrupted stage resumes automatically; DETR_PRETRAIN names weights to start from",
    "RESUME_STATES": "an interrupted stage resumes its position automatically",
    "USE_WANDB": "runs are recorded in MLflow",
    "EXP_OWNER": "runs are recorded in MLflow",
    "EXP_PROJECT": "runs are recorded in MLflow",
    "EXP_GROUP": "runs are recorded in MLflow",
    "EXP_NAME": "the run is named after curriculum and stage",
    "GIT_VERSION": "the commit is recorded automatically",
    "MULTI_LAST_CHECKPOINTS": "`EPOCH_CHECKPOINTS_KEPT` is the number of epochs whose weights are kept",
    "USE_PREVIOUS_CHECKPOINT": "the published loader of older files is not required",
    "USE_ACCELERATE_CLIP_NORM": "clipping is the same with one worker or many",
    "AUG_COLOR_JITTER_V2": "there is one colour jitter",
    "DETR_FRAMEWORK": "there is one detector, Deformable-DETR",
    "BENCHMARK": "results are recorded in MLflow",
}
"""Keys that are accepted so that published files run unchanged, and why they have no effect."""


def _yaml_no(value: Any) -> Any:
    """False to "no": YAML parses a bare `no` as false."""
    return "no" if value is False else value


class ValConfig(BaseModel):
    """Validation data and classes of a single stage (the ``val_config`` block of the training plan's files)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    GT_FOLDER: str | None = None
    "DanceTrack-style folder with <sequence>/gt/gt.txt."
    SEQMAP_FILE: str | None = None
    "List of sequences, first line `name`."
    SPLIT_TO_EVAL: str = "val"
    "Recorded with the scores."
    CLASSES_TO_EVAL: tuple[str, ...] | None = None
    "Classes of the class-averaged scores; null means all."
    CLASS_NAME_TO_ID: dict[str, int] | None = None
    "Class name to its id in result files, 1-based."
    BENCHMARK: str | None = None


@dataclass(frozen=True)
class ClipSchedule:
    """Clip lengths and frame intervals of one epoch; exactly one of the three interval rules is set.

    Attributes:
        lengths: clip length in frames, sampled from this set once per global batch.
        intervals: frame interval, sampled from this set once per clip.
        max_interval: the published rule, interval uniform in 1..max_interval.
        interval_seconds: as `intervals`, in seconds, converted with each video's frame rate.
    """

    lengths: tuple[int, ...]
    intervals: tuple[int, ...] | None
    max_interval: int | None
    interval_seconds: tuple[float, ...] | None = None


class Config(BaseModel):
    """One stage's configuration: frozen, unknown keys forbidden, every value validated.

    Attribute reads of keys are recorded within `record_reads`, by which a test checks that every key is used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Identity and system
    SEED: int = 29
    DEVICE: Literal["cuda", "cpu", "auto"] = "auto"
    "`cuda` falls back to the CPU, with a warning, if there is no CUDA device."
    NUM_WORKERS: int = Field(4, ge=0)
    "Decoding actors per training worker."
    PREFETCH_FACTOR: int = Field(2, ge=0)
    "Batches prepared ahead per training worker."
    root_path: str = "."
    "Data root if --data-root is not given."
    OUTPUT_DIR: str | None = None
    OUTPUTS_DIR: str | None = None
    "Folder under --storage for the stage; null = curricula/<curriculum>/<stage>/<digest of its inputs>."

    # Data
    DATA_ROOT: str = "./datasets/"
    DATASETS: tuple[str, ...] = ("DanceTrack",)
    DATASET_SPLITS: tuple[str, ...] = ("train",)
    DATASET_WEIGHTS: tuple[float, ...] | None = None
    CLASSES: tuple[str, ...] | None = None
    "Class names in the order of their ids; null = from val_config, else pedestrian and car."
    SAMPLE_STEPS: tuple[int, ...] = (0,)
    SAMPLE_LENGTHS: tuple[int, ...] | None = (30,)
    SAMPLE_INTERVALS: tuple[int, ...] | None = (4,)
    LENGTH_PER_ITERATION: int | None = None
    sampler_lengths: tuple[int, ...] | None = None
    sample_intervals: tuple[int, ...] | None = None
    sample_interval_seconds: tuple[float, ...] | None = None
    """Interval between the frames of a clip in seconds, sampled from this set and converted with each dataset's frame
    rate. Replaces sample_intervals if a stage mixes datasets of different rates."""
    CLIPS_PER_EPOCH: int | None = Field(None, ge=1)
    "Maximum number of clips per epoch, sampled anew each epoch; null = one per start frame."

    # Augmentation
    AUG_RESIZE_SCALES: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    AUG_MAX_SIZE: int = Field(1440, ge=1)
    AUG_RANDOM_RESIZE: tuple[int, ...] = (400, 500, 600)
    AUG_RANDOM_CROP_MIN: int = Field(384, ge=1)
    AUG_RANDOM_CROP_MAX: int = Field(600, ge=1)
    AUG_MAX_SHIFT_RATIO: float = Field(0.06, ge=0, le=1)
    AUG_OVERFLOW_BBOX: bool = False
    AUG_FLIP_PROB: float = Field(0.5, ge=0, le=1)
    AUG_BRIGHTNESS: float = Field(0.4, ge=0)
    AUG_CONTRAST: float = Field(0.4, ge=0)
    AUG_SATURATION: float = Field(0.4, ge=0)
    AUG_HUE: float = Field(0.2, ge=0, le=0.5)
    AUG_COLOR_JITTER_V2: bool = False
    AUG_NUM_GROUPS: int = Field(6, ge=1)
    AUG_TRAJECTORY_OCCLUSION_PROB: float = Field(0.5, ge=0, le=1)
    AUG_TRAJECTORY_SWITCH_PROB: float = Field(0.5, ge=0, le=1)
    NUM_TRAINING_IDS: int | None = Field(None, ge=1)
    "Maximum number of ID labels in a training clip; null = NUM_ID_VOCABULARY."
    SUBSET_OVERFLOW: Literal["distractor", "drop"] = "distractor"
    """Objects beyond the vocabulary: kept as newborn detections without history (`distractor`), or dropped as in the
    published code (`drop`). Kept by default, because crowds at inference contain objects without a label too, and the
    decoder must learn not to assign them the label of a neighbour."""

    # Network
    ONLY_DETR: bool = False
    NUM_CLASSES: int = Field(1, ge=1)
    NUM_ID_VOCABULARY: int = Field(50, ge=1)
    DETR_FRAMEWORK: Literal["deformable_detr"] = "deformable_detr"
    FEATURE_DIM: int = 256
    FFN_DIM_RATIO: int = Field(2, ge=1)
    ID_DIM: int = 256
    HEAD_DIM: int = 32
    NUM_ID_DECODER_LAYERS: int = Field(6, ge=1)
    ID_LOSS_WEIGHT: float = 1.0
    REL_PE_LENGTH: int = Field(30, ge=2)
    USE_AUX_LOSS: bool = False
    USE_SHARED_AUX_HEAD: bool = True
    USE_FOCAL_LOSS: bool = False
    BACKBONE: Literal["resnet50", "tiny_gn"] = "resnet50"
    "`tiny_gn`: small backbone with GroupNorm, for the demo and the tests."
    DILATION: bool = False
    DETR_NUM_QUERIES: int = Field(300, ge=1)
    DETR_NUM_FEATURE_LEVELS: int = Field(4, ge=1, le=4)
    DETR_AUX_LOSS: bool = True
    DETR_WITH_BOX_REFINE: bool = True
    DETR_TWO_STAGE: bool = False
    DETR_HIDDEN_DIM: int = 256
    DETR_MASKS: bool = False
    DETR_POSITION_EMBEDDING: Literal["sine"] = "sine"
    DETR_NUM_HEADS: int = 8
    DETR_ENC_LAYERS: int = Field(6, ge=1)
    DETR_DEC_LAYERS: int = Field(6, ge=1)
    DETR_DIM_FEEDFORWARD: int = 1024
    DETR_DROPOUT: float = 0.0
    DETR_DEC_N_POINTS: int = 4
    DETR_ENC_N_POINTS: int = 4
    INIT_GRID_QUERIES: bool = False
    "Fresh weights: initialise the queries' reference points on a grid over the image."
    INIT_COPY_ID_DECODER: bool = False
    "Fresh weights: initialise the ID decoder so that it copies the labels of similar tokens from the first step."

    # Losses
    DETR_CLS_LOSS_COEF: float = 2.0
    DETR_BBOX_LOSS_COEF: float = 5.0
    DETR_GIOU_LOSS_COEF: float = 2.0
    DETR_FOCAL_ALPHA: float = 0.25
    DETR_SET_COST_CLASS: float = 2.0
    DETR_SET_COST_BBOX: float = 5.0
    DETR_SET_COST_GIOU: float = 2.0
    DETR_CRITERION_BATCH_LEN: int = Field(10, ge=1)
    ID_SUPERVISION_LAYER: Literal["last", "published"] = "last"
    """Decoder layer whose matching assigns identities to queries: the last, or the second to last as in the published
    code. By default the last, because its embeddings are used for tracking: where the two matchings differ, the
    published choice trains an identity on the embedding of another object."""
    IGNORE_OVERLAP: float = Field(0.5, gt=0, le=1)
    "Unmatched predictions with at least this fraction of their area in ignore regions are not penalised."

    # Training
    BATCH_SIZE: int = Field(1, ge=1)
    ACCUMULATE_STEPS: int = Field(1, ge=1)
    EPOCHS: int = Field(10, ge=1)
    LR: float = Field(1.0e-4, ge=0)
    LR_BACKBONE: float | None = Field(None, ge=0)
    LR_BACKBONE_NAMES: tuple[str, ...] = ("backbone.0",)
    LR_BACKBONE_SCALE: float | None = 0.1
    LR_LINEAR_PROJ_NAMES: tuple[str, ...] = ("reference_points", "sampling_offsets")
    LR_LINEAR_PROJ_SCALE: float = 0.05
    LR_DICTIONARY_NAMES: tuple[str, ...] = ("word_to_embed", "embed_to_word")
    LR_DICTIONARY_SCALE: float = 1.0
    LR_WARMUP_EPOCHS: int = Field(1, ge=0)
    LR_DROP: int | None = Field(None, ge=1)
    SCHEDULER_MILESTONES: tuple[int, ...] | None = (6, 9)
    SCHEDULER_GAMMA: float = 0.1
    WEIGHT_DECAY: float = 0.0005
    MAX_CLIP_NORM: float = Field(0.1, gt=0)
    SEPARATE_CLIP_NORM: bool = True
    USE_ACCELERATE_CLIP_NORM: bool = True
    DETR_NUM_TRAIN_FRAMES: int = Field(4, ge=0)
    DETR_NUM_CHECKPOINT_FRAMES: int = Field(5, ge=0)
    USE_DECODER_CHECKPOINT: bool = False
    MEMORY_EFFICIENT: bool = False
    """A clip that does not fit GPU memory is retried with out-of-memory fallbacks: detector recomputed, one image at a
    time, ID decoder recomputed, smaller image. False: the batch is skipped immediately. Both are logged and counted."""
    MIXED_PRECISION: Annotated[Literal["bf16", "fp16", "no"] | None, BeforeValidator(_yaml_no)] = None
    "null = bf16 on CUDA devices that support it, else no."
    NONFINITE_LIMIT: int = Field(10, ge=1)
    "Consecutive skipped batches (non-finite loss or gradient, or out of memory in every fallback) that stop training."
    SAVE_CHECKPOINT_PER_EPOCH: int = Field(1, ge=1)
    CHECKPOINT_EVERY_STEPS: int | None = Field(None, ge=1)
    "Batches between two checkpoints within an epoch; null = by time only."
    CHECKPOINT_EVERY_MINUTES: float | None = Field(5.0, gt=0)
    "Minutes between two checkpoints within an epoch, the maximum loss by an interruption; null = not by time."
    CHECKPOINTS_KEPT: int = Field(2, ge=1)
    "Number of checkpoints within an epoch that are kept; the checkpoint of the finished epoch replaces them."
    EPOCH_CHECKPOINTS_KEPT: int | None = Field(None, ge=1)
    """Number of finished epochs whose weights are kept: the best by the stage's metric, plus the newest; null = all.
    The scores of all epochs are kept."""
    COLLECTIVE_TIMEOUT_S: int = Field(300, ge=1)
    "Seconds after which workers stop waiting for a worker that does not respond."
    PROGRESS_TIMEOUT_S: int = Field(1800, ge=1)
    """Seconds without any progress of a worker (a step, a tracked frame, a scored video, a written file), also in
    validation and while saving, after which the watchdog counts it as stalled and the workers exit. Slow work that
    makes progress does not count as stalled."""
    WORKER_RESTARTS: int = Field(8, ge=0)
    "Maximum number of restarts per stage after a lost worker; errors of the program are not retried."
    RESIZE_EVERY_S: int = Field(60, ge=1)
    "With --workers MIN:MAX: seconds between two polls of how many workers fit on the cluster."
    LOG_EVERY_STEPS: int = Field(10, ge=1)

    # Weights
    DETR_PRETRAIN: str | None = None
    PRETRAIN_CLASSES: tuple[str, ...] | None = None
    "Class names of the rows of DETR_PRETRAIN's class head, if the file does not contain them."
    CLASS_INIT: dict[str, str] | None = None
    "New class to the class whose weights it starts from, e.g. {van: car}; others start from the prior."
    PRETRAIN_ALLOW: tuple[str, ...] = ()
    """Tensors of DETR_PRETRAIN that may be missing, unknown or of another shape: full keys or patterns such as
    `id_decoder.*`. Any other mismatch is an error."""
    PRETRAIN_SKIP: tuple[str, ...] = ()
    "Tensors that are not transferred although they match, so that this part is trained from scratch: keys or patterns."
    RESUME_MODEL: str | None = None
    RESUME_OPTIMIZER: bool = True
    RESUME_SCHEDULER: bool = True
    RESUME_STATES: bool = True

    # Tracking and evaluation
    INFERENCE_MODEL: str | None = None
    INFERENCE_DATASET: str | None = None
    INFERENCE_SPLIT: str | None = None
    INFERENCE_MODE: str | None = None
    INFERENCE_GROUP: str | None = None
    INFERENCE_ONLY_DETR: bool | None = None
    INFERENCE_SHORT_SIDE: int = Field(800, ge=32)
    INFERENCE_MAX_LONGER: int = Field(1440, ge=32)
    INFERENCE_DTYPE: Literal["FP32", "FP16", "BF16"] = "FP32"
    ASSIGNMENT_PROTOCOL: Literal["hungarian", "object-max", "id-max"] = "object-max"
    MISS_TOLERANCE: int = Field(30, ge=1)
    "Maximum number of frames that an object may be missing and keep its track id."
    MEMORY_RULE: Literal["ours", "published"] = "ours"
    """`ours`: an object may be missing MISS_TOLERANCE frames. `published`: the memory covers MISS_TOLERANCE - 1
    frames, so an object may be missing two frames fewer. `ours` by default, so that the key's value is the limit and
    objects that are hidden for long are recovered."""
    NEWBORN_ORDER: Literal["score", "query"] = "score"
    """Order in which newborns get the free ID labels if there are too few: by score, or by query index as in the
    published code. By score by default, because the query index carries no information about an object, and detections
    with a high score are the most likely to be detected again."""
    MASK_UNUSED_LABELS: bool = True
    """Exclude ID labels without a remembered track from the softmax when tracking, since they cannot be correct;
    `False` as in the published code. A trained decoder gives them almost no probability, so with its own vocabulary
    the effect is small: 109 ID switches with the mask, 108 without, in 3612 boxes (a small decoder after 1200 steps on
    synthetic objects). After growth from 50 to 300 labels, before further training: 137 switches instead of 426."""
    DET_THRESH: float = Field(0.3, ge=0, le=1)
    NEWBORN_THRESH: float = Field(0.6, ge=0, le=1)
    ID_THRESH: float = Field(0.2, ge=0, le=1)
    AREA_THRESH: float = Field(0, ge=0)
    LONGTERM_PATIENCE: int = Field(0, ge=0)
    "Number of frames that a lost track is remembered for re-identification; 0 = off."
    LONGTERM_SIMILARITY: float = Field(0.85, ge=-1, le=1)
    LONGTERM_CAPACITY: int = Field(1000, ge=1)
    "Maximum number of lost tracks remembered for re-identification; beyond it the one lost first is removed."
    EVALUATE_EVERY_EPOCHS: int = Field(1, ge=1)
    val_config: ValConfig = ValConfig()

    # Accepted without effect (WITHOUT_EFFECT)
    USE_WANDB: bool = False
    EXP_OWNER: str | None = None
    EXP_PROJECT: str | None = None
    EXP_GROUP: str | None = None
    EXP_NAME: str | None = None
    GIT_VERSION: str | None = None
    MULTI_LAST_CHECKPOINTS: int = 0
    USE_PREVIOUS_CHECKPOINT: bool = False

    _name: str = PrivateAttr("config")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    RESERVED: ClassVar[frozenset[str]] = frozenset({"SUPER_CONFIG_PATH"})

    def model_post_init(self, _context: Any) -> None:
        check(self.__dict__)

    def __getattribute__(self, name: str) -> Any:
        if _active_recorders and (name.isupper() or name in _LOWER_KEYS):
            for recorder in _active_recorders:
                recorder.add(name)
        return super().__getattribute__(name)

    @property
    def name(self) -> str:
        """File stem of the leaf configuration."""
        return self._name

    def origin(self, key: str) -> str:
        """Source of a key's value: `file:line`, `--set`, or `default`."""
        return self._origins.get(key, "default")

    def named(self, name: str, origins: dict[str, str]) -> Config:
        """Set the name and the sources of the values, in place; returns self."""
        self._name = name
        self._origins = origins
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values of every key."""
        return {**self.model_dump(mode="json"), "_name": self._name}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Inverse of `to_dict`.

        Raises:
            MotipError: a key is unknown or a value is out of range.
        """
        plain = {key: value for key, value in values.items() if key != "_name"}
        try:
            config = Config(**plain)
        except ValidationError as error:
            raise MotipError(describe(error), where=values.get("_name", "configuration")) from None
        config._name = values.get("_name", "config")
        return config

    def replaced(self, **changes: Any) -> Config:
        """A validated copy with some keys changed."""
        return Config.from_dict({**self.to_dict(), **changes}).named(self._name, dict(self._origins))

    def digest(self) -> str:
        """Hex sha256 over all keys, without the file's name."""
        return digest(self.model_dump(mode="json"))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The NUM_CLASSES names in the order of their ids."""
        if self.CLASSES is not None:
            return self.CLASSES
        named = self.val_config.CLASS_NAME_TO_ID
        if named:
            return tuple(sorted(named, key=lambda name: named[name]))
        return ("pedestrian", "car")[: self.NUM_CLASSES]

    @property
    def lr_milestones(self) -> list[int]:
        """Epochs after which the learning rate is multiplied by SCHEDULER_GAMMA."""
        if self.LR_DROP is not None:
            return [self.LR_DROP]
        return list(self.SCHEDULER_MILESTONES or ())

    @property
    def backbone_lr_scale(self) -> float:
        """Backbone learning rate as a fraction of LR."""
        if self.LR_BACKBONE is not None:
            return self.LR_BACKBONE / self.LR if self.LR > 0 else 0.0
        return 0.1 if self.LR_BACKBONE_SCALE is None else self.LR_BACKBONE_SCALE

    def clip_schedule(self, epoch: int) -> ClipSchedule:
        """Clip lengths and intervals of ``epoch`` (0-based)."""
        step = max(i for i, start in enumerate(self.SAMPLE_STEPS) if start <= epoch)
        lengths = self.sampler_lengths or ((self.SAMPLE_LENGTHS or (1,))[step],)
        if self.sample_interval_seconds is not None:
            return ClipSchedule(lengths, None, None, self.sample_interval_seconds)
        if self.sample_intervals is not None:
            return ClipSchedule(lengths, self.sample_intervals, None)
        return ClipSchedule(lengths, None, (self.SAMPLE_INTERVALS or (1,))[step])


_LOWER_KEYS = frozenset(key for key in Config.model_fields if not key.isupper())


def describe(error: ValidationError) -> str:
    """The first validation error, in one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']} (found {first.get('input')!r})"


@contextlib.contextmanager
def record_reads() -> Iterator[set[str]]:
    """Collect the keys read by attribute access within the context, in this process."""
    names: set[str] = set()
    _active_recorders.append(names)
    try:
        yield names
    finally:
        _active_recorders.remove(names)
