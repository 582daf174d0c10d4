from __future__ import annotations

import numpy as np
import pytest
import torch

from motip.errors import MotipError
from motip.model import ModelSpec, build_model
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import Tracker
from tests.helpers.scripted_model import WIDTH, detections, features, following_model

SIZE = (480, 640)
FEATURES = features(16)


def _settings(**changes: object) -> TrackerSettings:
    return TrackerSettings(**({"newborn_thresh": 0.5, "miss_tolerance": 4} | changes))  # type: ignore[arg-type]


def _tracker(vocabulary: int = 8, rel_pe_length: int = 12, **changes: object) -> Tracker:
    return Tracker(following_model(vocabulary, rel_pe_length), _settings(**changes), SIZE)


def _update(tracker: Tracker, objects: list[int], **more: object) -> list[int]:
    return tracker.update(*detections(objects, FEATURES, **more)).ids.tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["hungarian", "object-max", "id-max"])
def test_objects_keep_their_ids_in_any_order(protocol: str) -> None:
    tracker = _tracker(assignment_protocol=protocol)
    assert _update(tracker, [0, 1, 2]) == [0, 1, 2]
    assert _update(tracker, [2, 0, 1]) == [2, 0, 1]
    assert _update(tracker, []) == []
    assert _update(tracker, [1, 3, 2]) == [1, 3, 2]


@pytest.mark.parametrize("tolerance", [0, 1, 4, 10])
def test_object_keeps_its_id_up_to_miss_tolerance(tolerance: int) -> None:
    for missing, expected in ((tolerance, 1), (tolerance + 1, 2)):
        tracker = _tracker(rel_pe_length=12, miss_tolerance=tolerance)
        assert _update(tracker, [0, 1]) == [0, 1]
        for _ in range(missing):
            assert _update(tracker, [0]) == [0]
        assert _update(tracker, [0, 1]) == [0, expected]


@pytest.mark.parametrize(("missing", "expected"), [(3, 1), (4, 2)])
def test_published_memory_rule_forgets_two_frames_early(missing: int, expected: int) -> None:
    tracker = _tracker(miss_tolerance=5, memory_rule="published")
    _update(tracker, [0, 1])
    for _ in range(missing):
        _update(tracker, [0])
    assert _update(tracker, [0, 1]) == [0, expected]


def test_memory_longer_than_the_position_table_works_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="needs REL_PE_LENGTH 10, the model has 6"):
        tracker = _tracker(rel_pe_length=6, miss_tolerance=8)
    _update(tracker, [0, 1])
    for _ in range(8):
        _update(tracker, [0])
    assert _update(tracker, [0, 1]) == [0, 1]
    assert any("REL_PE_LENGTH" in note for note in tracker.notes)


def test_newborns_with_lowest_scores_are_refused_without_free_labels() -> None:
    tracker = _tracker(vocabulary=3)
    tracks = tracker.update(*detections([0, 1, 2, 3, 4], FEATURES, scores=[0.6, 0.9, 0.7, 0.95, 0.8]))
    assert tracks.queries.tolist() == [1, 3, 4]
    assert tracker.counters["newborns_refused"] == 2
    # The published order takes the first queries of the frame instead.
    first_come = _tracker(vocabulary=3, newborn_order="query")
    tracks = first_come.update(*detections([0, 1, 2, 3, 4], FEATURES, scores=[0.6, 0.9, 0.7, 0.95, 0.8]))
    assert tracks.queries.tolist() == [0, 1, 2]


def test_label_of_the_longest_unseen_track_is_recycled() -> None:
    tracker = _tracker(vocabulary=3)
    _update(tracker, [0, 1, 2])
    _update(tracker, [0, 1])  # 2 is unseen for longer than 1
    _update(tracker, [0])
    assert _update(tracker, [0, 3]) == [0, 3]
    assert tracker.counters["labels_recycled"] == 1
    assert _update(tracker, [0, 1, 3]) == [0, 1, 3]
    assert _update(tracker, [0, 1, 3, 4, 5]) == [0, 1, 3]
    assert tracker.counters["newborns_refused"] == 2
    assert _update(tracker, [0, 1, 2]) == [0, 1, 4], "a dropped id is never used again"


def test_track_class_is_voted_beside_the_frame_class() -> None:
    tracker = _tracker()
    for scores, classes in (([0.9], [0]), ([0.8], [0]), ([0.95], [1])):
        tracks = tracker.update(*detections([0], FEATURES, scores=scores, classes=classes))
    assert tracks.frame_class_ids.tolist() == [1]
    assert tracks.class_ids.tolist() == [0]


def test_thresholds_are_strict() -> None:
    tracker = _tracker(det_thresh=0.5, newborn_thresh=0.5)
    logits = torch.tensor([[0.0, -9.0]])  # sigmoid(0) is exactly 0.5
    box = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    assert len(tracker.update(logits, box, FEATURES[:1])) == 0
    area = 0.1 * 640 * 0.1 * 480
    box64 = torch.tensor([[0.5, 0.5, 0.125, 0.125]])
    large = _tracker(area_thresh=0.125 * 640 * 0.125 * 480)
    assert area < 0.125 * 640 * 0.125 * 480
    assert len(large.update(torch.tensor([[3.0, -9.0]]), box64, FEATURES[:1])) == 0
    larger = _tracker(area_thresh=0.125 * 640 * 0.125 * 480 - 1)
    assert len(larger.update(torch.tensor([[3.0, -9.0]]), box64, FEATURES[:1])) == 1


def test_duplicate_detection_gets_another_id() -> None:
    for protocol in ("hungarian", "object-max", "id-max"):
        tracker = _tracker(assignment_protocol=protocol)
        _update(tracker, [0, 1])
        ids = _update(tracker, [0, 0, 1])
        assert sorted(ids) == [0, 1, 2], protocol


def test_bfloat16_detections_give_boxes_beyond_pixel_resolution() -> None:
    model = following_model()
    tracker = Tracker(model, _settings(), (2000, 4000))
    boxes = torch.tensor([[0.70000001, 0.5, 0.01, 0.02]])
    tracks = tracker.update(torch.tensor([[3.0, -9.0]]).bfloat16(), boxes, FEATURES[:1])
    assert abs(float(tracks.boxes_xyxy[0, 0]) - (0.7 - 0.005) * 4000) < 1e-2


def test_id_scores_equal_a_forward_pass_over_the_history() -> None:
    """Cached keys and values against a forward pass over the complete history in every frame."""
    model = following_model(vocabulary=40)
    tracker = Tracker(model, _settings(), SIZE)
    past: list[tuple[torch.Tensor, np.ndarray]] = []
    compared = 0
    rng = np.random.default_rng(3)
    for frame in range(12):
        seen = rng.permutation(5)[: rng.integers(1, 6)].tolist()
        logits, boxes, embeds = detections(seen, FEATURES + torch.randn(FEATURES.shape) * 0.2)
        recorded: dict[str, torch.Tensor] = {}
        tracker._assign = _recording(tracker._assign, recorded)
        tracks = tracker.update(logits, boxes, embeds)
        window = past[-5:]
        if window and tracker.active_labels.size:
            expected = _forward_scores(model, window, embeds)
            np.testing.assert_allclose(recorded["scores"], expected, atol=2e-5, err_msg=f"frame {frame}")
            compared += 1
        past.append((embeds[torch.from_numpy(tracks.queries)], tracks.labels))
    assert compared > 5


def _recording(assign, recorded):  # type: ignore[no-untyped-def]
    def wrapped(scores, tracked, threshold):  # type: ignore[no-untyped-def]
        recorded["scores"] = scores
        return assign(scores, tracked, threshold)

    return wrapped


@torch.inference_mode()
def _forward_scores(model, window, embeds) -> np.ndarray:  # type: ignore[no-untyped-def]
    slots = max(len(labels) for _, labels in window)
    past = torch.zeros(1, 1, len(window), slots, WIDTH)
    labels = torch.full((1, 1, len(window), slots), -1)
    for time, (seen, seen_labels) in enumerate(window):
        past[0, 0, time, : len(seen)] = seen
        labels[0, 0, time, : len(seen)] = torch.from_numpy(seen_labels)
    logits = model.id_decoder(
        model.trajectory_modeling(past),
        labels,
        labels < 0,
        list(range(len(window))),
        embeds[None, None, None],
        torch.zeros(1, 1, 1, len(embeds), dtype=torch.bool),
        [len(window)],
    )
    return logits[-1, 0, 0, 0].softmax(-1).numpy()


@pytest.mark.parametrize(
    ("protocol", "frames"),
    [
        ("hungarian", 120),
        ("object-max", 500),
        ("id-max", 120),
        pytest.param("object-max", 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_random_frames_keep_ids_unique_and_never_reused(protocol: str, frames: int) -> None:
    """0..500 detections per frame through random weights: ids unique in a frame, never reused in the sequence."""
    spec = ModelSpec(
        num_classes=2,
        backbone="tiny_gn",
        num_queries=4,
        hidden_dim=32,
        num_heads=2,
        feature_dim=32,
        id_dim=32,
        enc_layers=1,
        dec_layers=1,
        dim_feedforward=32,
        num_id_decoder_layers=1,
        num_id_vocabulary=20,
        rel_pe_length=8,
    )
    torch.manual_seed(1)
    model = build_model(spec).eval()
    rng = torch.Generator().manual_seed(2)
    # With a low ID threshold random scores match occasionally.
    tracker = Tracker(model, _settings(assignment_protocol=protocol, id_thresh=0.04), SIZE)
    label_of: dict[int, int] = {}  # track id -> its label
    dropped: set[int] = set()
    alive: set[int] = set()
    continued = 0
    for frame in range(frames):
        count = int(torch.randint(0, 501, (1,), generator=rng))
        crowd = torch.randn(count, 2, generator=rng) * 3
        boxes = torch.rand(count, 4, generator=rng)
        tracks = tracker.update(crowd, boxes, torch.randn(count, 32, generator=rng) * 3)
        ids = tracks.ids.tolist()
        assert len(set(ids)) == len(ids) <= 20, frame
        assert len(set(tracks.labels.tolist())) == len(ids), frame
        assert not dropped & set(ids), f"frame {frame} reuses an id"
        for track_id, label in zip(ids, tracks.labels.tolist(), strict=True):
            assert label_of.setdefault(track_id, label) == label
        continued += int((~tracks.newborn).sum())
        remembered = {track_id for track_id in tracker._ids.tolist() if track_id >= 0}
        dropped |= (alive | set(ids)) - remembered
        alive = remembered
        assert sorted(tracker.id_queue.tolist()) == list(range(20))
    assert tracker.counters["newborns_refused"] > 0
    assert tracker.counters["labels_recycled"] > 0
    assert continued > 0


def test_detector_only_model_is_an_error() -> None:
    spec = ModelSpec(
        backbone="tiny_gn", num_queries=4, hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1, only_detr=True
    )
    with pytest.raises(MotipError, match="ONLY_DETR"):
        Tracker(build_model(spec), TrackerSettings(), SIZE)


def test_non_finite_values_are_an_error() -> None:
    tracker = _tracker()
    _update(tracker, [0])
    logits, boxes, embeds = detections([0], FEATURES)
    with pytest.raises(MotipError, match="detector's output is not finite"):
        tracker.update(logits, boxes * float("nan"), embeds)
    with pytest.raises(MotipError, match="ID decoder's output is not finite"):
        tracker.update(logits, boxes, embeds * float("nan"))


def test_mismatched_shapes_are_an_error() -> None:
    with pytest.raises(MotipError, match="does not fit the model"):
        _tracker().update(torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, WIDTH + 1))


def test_trackers_with_a_shared_decoder_have_separate_tracks() -> None:
    model = following_model(8, 12)
    first = Tracker(model, _settings(), SIZE)
    second = Tracker(model, _settings(), SIZE, first.decoder)
    alone = Tracker(model, _settings(), SIZE)
    assert second.decoder is first.decoder and alone.decoder is not first.decoder
    for objects in ([0, 1, 2], [2, 0], [3, 2, 0]):
        assert _update(second, objects) == _update(alone, objects)
        _update(first, objects[::-1])
    assert first.active_labels.tolist() == [0, 1, 2, 3]
    assert _update(first, [2, 1, 0]) == [0, 1, 2], "the first tracker had the objects in reverse order"
