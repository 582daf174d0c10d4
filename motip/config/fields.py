"""Keys of a stage's configuration: type, default and meaning. The names are those of the training plan and the
published code. docs/configuration.md is generated from them, with the comments as titles of its tables.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from motip.config.block import Block


def _yaml_no(value: Any) -> Any:
    """False to "no": YAML parses a bare `no` as false."""
    return "no" if value is False else value


class ValConfig(Block):
    """Validation data and classes of a single stage (the ``val_config`` block of the training plan's files)."""

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
    "No effect: results are recorded in MLflow."


class Keys(Block):
    """Every key of one stage's configuration; meanings are from the MOTIP and Deformable DETR papers."""

    # Identity and system
    SEED: int = 29
    "Seed of fresh weights, clip order and augmentation."
    DEVICE: Literal["cuda", "cpu", "auto"] = "auto"
    "`cuda` falls back to the CPU, with a warning, if there is no CUDA device."
    NUM_WORKERS: int = Field(4, ge=0)
    "Decoding actors per training worker."
    PREFETCH_FACTOR: int = Field(2, ge=0)
    "Batches prepared ahead per training worker."
    root_path: str = "."
    "Data root if --data-root is not given."
    OUTPUT_DIR: str | None = None
    "The training plan's name for OUTPUTS_DIR."
    OUTPUTS_DIR: str | None = None
    "Folder under --storage for the stage; null = curricula/<curriculum>/<stage>/<digest of its inputs>."

    # Data
    DATA_ROOT: str = "./datasets/"
    "Folder under the data root that is searched first for DATASETS (ray_jobs/train.py)."
    DATASETS: tuple[str, ...] = ("DanceTrack",)
    "Data of a single stage: BDD100K, VisDrone, DanceTrack. A curriculum file names its own sources."
    DATASET_SPLITS: tuple[str, ...] = ("train",)
    "Training split of each of DATASETS, or one for all."
    DATASET_WEIGHTS: tuple[float, ...] | None = None
    "Clips per start frame of each of DATASETS, relative to the others; null = equal."
    CLASSES: tuple[str, ...] | None = None
    "Class names in the order of their ids; null = from val_config, else pedestrian and car."
    SAMPLE_STEPS: tuple[int, ...] = (0,)
    "Epochs (0-based) from which the next entries of SAMPLE_LENGTHS and SAMPLE_INTERVALS apply."
    SAMPLE_LENGTHS: tuple[int, ...] | None = (30,)
    "Clip length in frames, one per entry of SAMPLE_STEPS."
    SAMPLE_INTERVALS: tuple[int, ...] | None = (4,)
    "Largest frame interval, one per entry of SAMPLE_STEPS; sampled uniformly from 1 to this."
    LENGTH_PER_ITERATION: int | None = None
    "Divides the clips of an epoch by clip length / this; null = all clips."
    sampler_lengths: tuple[int, ...] | None = None
    "Clip length in frames, sampled from this set; the training plan's form of SAMPLE_LENGTHS."
    sample_intervals: tuple[int, ...] | None = None
    "Frame interval, sampled from this set; the training plan's form of SAMPLE_INTERVALS."
    sample_interval_seconds: tuple[float, ...] | None = None
    """Interval between the frames of a clip in seconds, sampled from this set and converted with each dataset's frame
    rate. Replaces sample_intervals if a stage mixes datasets of different rates."""
    CLIPS_PER_EPOCH: int | None = Field(None, ge=1)
    "Maximum number of clips per epoch, sampled anew each epoch; null = one per start frame."

    # Augmentation
    AUG_RESIZE_SCALES: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    "Short side of the image in pixels, sampled from this set."
    AUG_MAX_SIZE: int = Field(1440, ge=1)
    "Maximum long side of the image in pixels."
    AUG_RANDOM_RESIZE: tuple[int, ...] = (400, 500, 600)
    """Half of the clips are cropped; short side before the crop in pixels, sampled from this set. An empty list: no
    crops."""
    AUG_RANDOM_CROP_MIN: int = Field(384, ge=1)
    "Smallest side of the crop in pixels."
    AUG_RANDOM_CROP_MAX: int = Field(600, ge=1)
    "Largest side of the crop in pixels."
    AUG_MAX_SHIFT_RATIO: float = Field(0.06, ge=0, le=1)
    "Clips made of one image: maximum shift of the window as a fraction of its sides."
    AUG_OVERFLOW_BBOX: bool = False
    "Boxes that a crop cuts keep the part outside instead of being clipped."
    AUG_FLIP_PROB: float = Field(0.5, ge=0, le=1)
    "Probability that a clip is mirrored."
    AUG_BRIGHTNESS: float = Field(0.4, ge=0)
    "Range x of the colour jitter; the factor is sampled from [1 - x, 1 + x] once per clip."
    AUG_CONTRAST: float = Field(0.4, ge=0)
    "As AUG_BRIGHTNESS."
    AUG_SATURATION: float = Field(0.4, ge=0)
    "As AUG_BRIGHTNESS."
    AUG_HUE: float = Field(0.2, ge=0, le=0.5)
    "Largest hue shift, in turns of the colour circle."
    AUG_COLOR_JITTER_V2: bool = False
    "No effect: there is one colour jitter."
    AUG_NUM_GROUPS: int = Field(6, ge=1)
    "Number of random assignments of ID labels per clip that the ID decoder is trained on."
    AUG_TRAJECTORY_OCCLUSION_PROB: float = Field(0.5, ge=0, le=1)
    "Probability that parts of a trajectory are hidden from the ID decoder."
    AUG_TRAJECTORY_SWITCH_PROB: float = Field(0.5, ge=0, le=1)
    "Probability that trajectories swap detections in a frame of the history."
    NUM_TRAINING_IDS: int | None = Field(None, ge=1)
    "Maximum number of ID labels in a training clip; null = NUM_ID_VOCABULARY."
    SUBSET_OVERFLOW: Literal["distractor", "drop"] = "distractor"
    """Objects beyond the vocabulary: kept as newborn detections without history (`distractor`), or dropped as in the
    published code (`drop`). Kept by default, because crowds at inference contain objects without a label too, and the
    decoder must learn not to assign them the label of a neighbour."""

    # Network
    ONLY_DETR: bool = False
    "Train the detector alone, without ID decoder."
    NUM_CLASSES: int = Field(1, ge=1)
    "Object classes; their names come from CLASSES or val_config.CLASS_NAME_TO_ID."
    NUM_ID_VOCABULARY: int = Field(50, ge=1)
    "Number of ID labels, the maximum number of concurrent tracks. May grow between stages."
    DETR_FRAMEWORK: Literal["deformable_detr"] = "deformable_detr"
    "No effect: there is one detector, Deformable-DETR."
    FEATURE_DIM: int = 256
    "Width of a detection's feature; equals DETR_HIDDEN_DIM."
    FFN_DIM_RATIO: int = Field(2, ge=1)
    "Width of the ID decoder's feed-forward layers, in multiples of their input."
    ID_DIM: int = 256
    "Width of an ID label's embedding."
    HEAD_DIM: int = 32
    "Width of an attention head of the ID decoder."
    NUM_ID_DECODER_LAYERS: int = Field(6, ge=1)
    "Layers of the ID decoder."
    ID_LOSS_WEIGHT: float = 1.0
    "Weight of the ID loss, relative to the detection loss."
    REL_PE_LENGTH: int = Field(30, ge=2)
    "Length of the ID decoder's history in frames; the maximum clip length."
    USE_AUX_LOSS: bool = False
    "ID loss on every layer of the ID decoder instead of the last."
    USE_SHARED_AUX_HEAD: bool = True
    "With USE_AUX_LOSS: one output head for all layers."
    USE_FOCAL_LOSS: bool = False
    "ID loss: sigmoid focal loss instead of cross-entropy."
    BACKBONE: Literal["resnet50", "tiny_gn"] = "resnet50"
    "`tiny_gn`: small backbone with GroupNorm, for the demo and the tests."
    DILATION: bool = False
    "Dilated last stage of ResNet-50."
    DETR_NUM_QUERIES: int = Field(300, ge=1)
    "Object queries, the maximum number of detections in a frame."
    DETR_NUM_FEATURE_LEVELS: int = Field(4, ge=1, le=4)
    "Number of feature maps that the transformer attends to: 3 or 4."
    DETR_AUX_LOSS: bool = True
    "Detection loss on every decoder layer."
    DETR_WITH_BOX_REFINE: bool = True
    "Boxes are refined from layer to layer; only True is supported."
    DETR_TWO_STAGE: bool = False
    "Only False is supported."
    DETR_HIDDEN_DIM: int = 256
    "Width of the transformer."
    DETR_MASKS: bool = False
    "Only False is supported."
    DETR_POSITION_EMBEDDING: Literal["sine"] = "sine"
    "Position encoding of the feature maps."
    DETR_NUM_HEADS: int = 8
    "Attention heads of the detector."
    DETR_ENC_LAYERS: int = Field(6, ge=1)
    "Encoder layers of the detector."
    DETR_DEC_LAYERS: int = Field(6, ge=1)
    "Decoder layers of the detector."
    DETR_DIM_FEEDFORWARD: int = 1024
    "Width of the detector's feed-forward layers."
    DETR_DROPOUT: float = 0.0
    "Dropout of the detector's transformer."
    DETR_DEC_N_POINTS: int = 4
    "Sampling points per head and level in the decoder."
    DETR_ENC_N_POINTS: int = 4
    "Sampling points per head and level in the encoder."
    INIT_GRID_QUERIES: bool = False
    "Fresh weights: initialise the queries' reference points on a grid over the image."
    INIT_COPY_ID_DECODER: bool = False
    "Fresh weights: initialise the ID decoder so that it copies the labels of similar tokens from the first step."

    # Losses
    DETR_CLS_LOSS_COEF: float = 2.0
    "Weight of the classification loss."
    DETR_BBOX_LOSS_COEF: float = 5.0
    "Weight of the L1 box loss."
    DETR_GIOU_LOSS_COEF: float = 2.0
    "Weight of the generalised-IoU loss."
    DETR_FOCAL_ALPHA: float = 0.25
    "Alpha of the focal classification loss."
    DETR_SET_COST_CLASS: float = 2.0
    "Weight of the class cost in the matching of queries to objects."
    DETR_SET_COST_BBOX: float = 5.0
    "Weight of the L1 box distance in the matching."
    DETR_SET_COST_GIOU: float = 2.0
    "Weight of the generalised IoU in the matching."
    DETR_CRITERION_BATCH_LEN: int = Field(10, ge=1)
    "Frames over which two logged errors are averaged; no effect on the losses."
    ID_SUPERVISION_LAYER: Literal["last", "published"] = "last"
    """Decoder layer whose matching assigns identities to queries: the last, or the second to last as in the published
    code. By default the last, because its embeddings are used for tracking: where the two matchings differ, the
    published choice trains an identity on the embedding of another object."""
    IGNORE_OVERLAP: float = Field(0.5, gt=0, le=1)
    "Unmatched predictions with at least this fraction of their area in ignore regions are not penalised."

    # Training
    BATCH_SIZE: int = Field(1, ge=1)
    "Clips per training worker and batch."
    ACCUMULATE_STEPS: int = Field(1, ge=1)
    "Batches per optimiser step."
    EPOCHS: int = Field(10, ge=1)
    "Epochs of the stage."
    LR: float = Field(1.0e-4, ge=0)
    "Learning rate of all parameters that are in none of the groups below."
    LR_BACKBONE: float | None = Field(None, ge=0)
    "Absolute learning rate of the backbone; null = LR x LR_BACKBONE_SCALE. 0 freezes it."
    LR_BACKBONE_NAMES: tuple[str, ...] = ("backbone.0",)
    "Parameters with one of these in their name are the backbone."
    LR_BACKBONE_SCALE: float | None = 0.1
    "Learning rate of the backbone as a fraction of LR."
    LR_LINEAR_PROJ_NAMES: tuple[str, ...] = ("reference_points", "sampling_offsets")
    "Parameters with one of these in their name are the sampling-point group."
    LR_LINEAR_PROJ_SCALE: float = 0.05
    "Learning rate of this group as a fraction of LR."
    LR_DICTIONARY_NAMES: tuple[str, ...] = ("word_to_embed", "embed_to_word")
    "Parameters with one of these in their name are the ID dictionary."
    LR_DICTIONARY_SCALE: float = 1.0
    "Learning rate of the ID dictionary as a fraction of LR."
    LR_WARMUP_EPOCHS: int = Field(1, ge=0)
    "Epochs of linear warm-up from 0; milestones do not apply during it."
    LR_DROP: int | None = Field(None, ge=1)
    "A single milestone; the training plan's form of SCHEDULER_MILESTONES."
    SCHEDULER_MILESTONES: tuple[int, ...] | None = (6, 9)
    "Epochs after which the learning rates are multiplied by SCHEDULER_GAMMA."
    SCHEDULER_GAMMA: float = 0.1
    "Factor at each milestone."
    WEIGHT_DECAY: float = 0.0005
    "Weight decay of AdamW, on every parameter."
    MAX_CLIP_NORM: float = Field(0.1, gt=0)
    "Maximum gradient norm; larger gradients are scaled down."
    SEPARATE_CLIP_NORM: bool = True
    "Clip the detector's gradients and the other gradients separately."
    USE_ACCELERATE_CLIP_NORM: bool = True
    "No effect: clipping is the same with one worker or many."
    DETR_NUM_TRAIN_FRAMES: int = Field(4, ge=0)
    "Frames of a clip whose detection gets a gradient; 0 freezes the detector."
    DETR_NUM_CHECKPOINT_FRAMES: int = Field(5, ge=0)
    "Images per detector chunk, recomputed in the backward pass; 0 = all in one, no recomputation."
    USE_DECODER_CHECKPOINT: bool = False
    "Recompute the ID decoder's layers in the backward pass: less memory, more time."
    MEMORY_EFFICIENT: bool = False
    """A clip that does not fit GPU memory is retried with out-of-memory fallbacks: detector recomputed, one image at a
    time, ID decoder recomputed, smaller image. False: the batch is skipped immediately. Both are logged and counted."""
    MIXED_PRECISION: Annotated[Literal["bf16", "fp16", "no"] | None, BeforeValidator(_yaml_no)] = None
    "null = bf16 on CUDA devices that support it, else no."
    NONFINITE_LIMIT: int = Field(10, ge=1)
    "Consecutive skipped batches (non-finite loss or gradient, or out of memory in every fallback) that stop training."
    SAVE_CHECKPOINT_PER_EPOCH: int = Field(1, ge=1)
    "Epochs between checkpoints; validated epochs are always saved."
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
    "Steps between two records of losses and learning rates."

    # Weights
    DETR_PRETRAIN: str | None = None
    "Weights to start from: a detector or a complete MOTIP checkpoint. A curriculum sets it."
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
    "No effect: an interrupted stage resumes automatically; DETR_PRETRAIN names weights to start from."
    RESUME_OPTIMIZER: bool = True
    "Resume the optimiser state, if DETR_PRETRAIN is a checkpoint of the same configuration."
    RESUME_SCHEDULER: bool = True
    "Resume the position in the schedule, under the same condition."
    RESUME_STATES: bool = True
    "No effect: an interrupted stage resumes its position automatically."

    # Tracking and evaluation
    INFERENCE_MODEL: str | None = None
    "No effect: pass the checkpoint to motip track or ray_jobs/evaluate.py on the command line."
    INFERENCE_DATASET: str | None = None
    "No effect: the curriculum's sources are evaluated."
    INFERENCE_SPLIT: str | None = None
    "No effect: stages are validated on the val split; ray_jobs/evaluate.py takes --split."
    INFERENCE_MODE: str | None = None
    "No effect: labelled splits are scored, unlabelled ones only tracked."
    INFERENCE_GROUP: str | None = None
    "No effect: results are written to the stage's folder."
    INFERENCE_ONLY_DETR: bool | None = None
    "No effect: use motip track with any checkpoint that contains the ID decoder."
    INFERENCE_SHORT_SIDE: int = Field(800, ge=32)
    "Short side of the frames in pixels for tracking ..."
    INFERENCE_MAX_LONGER: int = Field(1440, ge=32)
    "... unless the long side would exceed this."
    INFERENCE_DTYPE: Literal["FP32", "FP16", "BF16"] = "FP32"
    "Floating-point type of the detector when tracking."
    ASSIGNMENT_PROTOCOL: Literal["hungarian", "object-max", "id-max"] = "object-max"
    "Assignment of ID labels by score: one-to-one optimum, best per object, or best per label."
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
    "Class score above which a query is a detection."
    NEWBORN_THRESH: float = Field(0.6, ge=0, le=1)
    "Class score above which a detection without an ID label starts a track."
    ID_THRESH: float = Field(0.2, ge=0, le=1)
    "Minimum score of an ID label."
    AREA_THRESH: float = Field(0, ge=0)
    "Area in square pixels of the original image above which a detection is kept."
    LONGTERM_PATIENCE: int = Field(0, ge=0)
    "Number of frames that a lost track is remembered for re-identification; 0 = off."
    LONGTERM_SIMILARITY: float = Field(0.85, ge=-1, le=1)
    "Minimum cosine similarity for matching a new track to a lost one."
    LONGTERM_CAPACITY: int = Field(1000, ge=1)
    "Maximum number of lost tracks remembered for re-identification; beyond it the one lost first is removed."
    EVALUATE_EVERY_EPOCHS: int = Field(1, ge=1)
    "Epochs between validations; the last epoch is always validated."
    val_config: ValConfig = ValConfig()
    "Block with the validation data, see below."

    # Accepted without effect
    USE_WANDB: bool = False
    "No effect: runs are recorded in MLflow."
    EXP_OWNER: str | None = None
    "No effect: runs are recorded in MLflow."
    EXP_PROJECT: str | None = None
    "No effect: runs are recorded in MLflow."
    EXP_GROUP: str | None = None
    "No effect: runs are recorded in MLflow."
    EXP_NAME: str | None = None
    "No effect: the run is named after curriculum and stage."
    GIT_VERSION: str | None = None
    "No effect: the commit is recorded automatically."
    MULTI_LAST_CHECKPOINTS: int = 0
    "No effect: `EPOCH_CHECKPOINTS_KEPT` is the number of epochs whose weights are kept."
    USE_PREVIOUS_CHECKPOINT: bool = False
    "No effect: the published loader of older files is not required."


WITHOUT_EFFECT = {
    name: field.description.removeprefix("No effect: ").rstrip(".")
    for model in (Keys, ValConfig)
    for name, field in model.model_fields.items()
    if field.description is not None and field.description.startswith("No effect: ")
}
"""Keys that are accepted so that published files run unchanged, and why they have no effect."""
