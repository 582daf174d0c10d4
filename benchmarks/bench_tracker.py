"""Milliseconds per frame of the tracker without the detector: ours against the naive form; equal ids are asserted.

    python -m benchmarks.bench_tracker                  # the figures of docs/performance.md
    python -m benchmarks.bench_tracker --objects 200    # crowded scene, with 200 ID labels
    python -m benchmarks.bench_tracker --quick          # seconds

The naive form is a direct implementation of MOTIP: in every frame the complete history (29 frames) passes trajectory
modelling and `nn.MultiheadAttention` in each of the 6 layers, with attention maps, and detections are handled in Python
loops. Ours projects a detection once, when it becomes history. Both have the same full-size weights (256 + 256
channels, 6 layers, 50 ID labels or one per object), process the same detections and must give the same ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_id_decoder import NaiveIdDecoder
from benchmarks.machine import Stopwatch, cores_allowed
from benchmarks.records import Recorder, add_flags, quantity
from motip.model import ModelSpec, build_model
from motip.model.motip import MOTIP
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import Tracker
from tests.parity import recipe

HISTORY = 29
CROWD = 100
"""Number of objects from which a third of the frames is timed: the naive form takes seconds per frame."""
SETTINGS = TrackerSettings(memory_rule="published", newborn_order="query", mask_unused_labels=False, newborn_thresh=0.5)
FrameDetections = tuple[Tensor, Tensor, Tensor]


class NaiveTracker:
    """Full recomputation and per-detection loops; the published rules needed for objects that stay in view."""

    def __init__(self, model: MOTIP) -> None:
        assert model.trajectory_modeling is not None and model.id_decoder is not None
        self.modelling = model.trajectory_modeling
        self.decoder = NaiveIdDecoder(model.spec)
        self.decoder.copy_from(model.id_decoder)
        self.decoder.eval()
        self.frames: list[tuple[Tensor, list[int]]] = []
        self.ids: dict[int, int] = {}
        self.queue = list(range(model.spec.num_id_vocabulary))

    @torch.no_grad()
    def update(self, logits: Tensor, boxes: Tensor, embeds: Tensor) -> list[int]:
        scores = logits.sigmoid().max(-1).values
        kept = [index for index in range(len(scores)) if scores[index].item() > SETTINGS.det_thresh]
        embeds = embeds[kept]
        labels: list[int] = [self.decoder.words - 1] * len(kept)
        if self.frames and kept:
            id_scores = self._identify(embeds).softmax(-1)
            for index in range(len(kept)):
                label = int(id_scores[index].argmax().item())
                rivals = (
                    [
                        other
                        for other in range(len(kept))
                        if other != index
                        and id_scores[other].argmax().item() == label
                        and id_scores[other, label].item() > id_scores[index, label].item()
                    ]
                    if label in self.ids
                    else [index]
                )
                if not rivals and id_scores[index, label].item() >= SETTINGS.id_thresh:
                    labels[index] = label
        for index in range(len(kept)):
            if labels[index] == self.decoder.words - 1:
                labels[index] = next(label for label in self.queue if label not in labels)
                self.ids[labels[index]] = max(self.ids.values(), default=-1) + 1
        for label in labels:
            self.queue.remove(label)
            self.queue.append(label)
        self.frames = [*self.frames[-(HISTORY - 1) :], (embeds, labels)]
        return [self.ids[label] for label in labels]

    def _identify(self, objects: Tensor) -> Tensor:
        known = sorted({label for _, labels in self.frames for label in labels})
        history = torch.zeros(len(self.frames), len(known), objects.shape[-1])
        hidden = torch.ones(len(self.frames), len(known), dtype=torch.bool)
        for frame, (embeds, labels) in enumerate(self.frames):
            for row, label in enumerate(labels):
                history[frame, known.index(label)] = embeds[row]
                hidden[frame, known.index(label)] = False
        decoder = self.decoder
        one_hot = torch.eye(decoder.words)
        words = decoder.word_to_embed(one_hot[torch.tensor(known)]).expand(len(self.frames), -1, -1)
        tokens_past = torch.cat([self.modelling(history), words], -1).flatten(0, 1)[None]
        newborn = decoder.word_to_embed(one_hot[-1]).expand(len(objects), -1)
        tokens = torch.cat([objects, newborn], -1)[None]
        ages = (len(self.frames) - torch.arange(len(self.frames))).repeat_interleave(len(known))
        ages = ages.expand(len(objects), -1)
        for layer in range(len(decoder.cross_attn)):
            if layer > 0:
                attended, _ = decoder.self_attn[layer - 1](tokens, tokens, tokens)
                tokens = decoder.self_norm[layer - 1](tokens + attended)
            mask = decoder.rel_pos_embeds[layer][ages].permute(2, 0, 1).clone()
            mask[:, hidden.flatten().expand(len(objects), -1)] = float("-inf")
            attended, _ = decoder.cross_attn[layer](tokens, tokens_past, tokens_past, attn_mask=mask)
            tokens = decoder.cross_norm[layer](tokens + attended)
            tokens = decoder.ffn_norm[layer](tokens + decoder.ffn[layer](tokens))
        return decoder.embed_to_word(tokens[0, :, -decoder.id_dim :])


def full_size_model(labels: int = 50) -> MOTIP:
    """Full-size ID half with weights that match features, and a minimal detector that is not run."""
    small: dict[str, Any] = {"num_queries": 4, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 32}
    spec = ModelSpec(backbone="tiny_gn", num_id_vocabulary=labels, **small)
    model = build_model(spec).eval()
    model.load_state_dict(recipe.copy_id_decoder_weights(model, 0), strict=False)
    return model


def scripted_detections(objects: int, frames: int) -> list[FrameDetections]:
    """300 queries per frame, `objects` of them confident, in random order."""
    rng = np.random.default_rng(0)
    appearance = torch.from_numpy(rng.choice([-1.0, 1.0], (objects, 256))).float()
    detections = []
    for _ in range(frames):
        where = torch.from_numpy(rng.permutation(300)[:objects])
        logits, boxes = torch.full((300, 1), -5.0), torch.rand(300, 4)
        embeds = torch.randn(300, 256)
        logits[where], boxes[where] = 3.0, torch.tensor([0.5, 0.5, 0.1, 0.1])
        embeds[where] = appearance + torch.randn(objects, 256) * 0.05
        detections.append((logits, boxes, embeds))
    return detections


def timed(
    update: Callable[[FrameDetections], list[int]], frames: list[FrameDetections]
) -> tuple[list[float], list[float], list[list[int]]]:
    """Wall and CPU milliseconds of each frame once the history is full, and the ids of every frame."""
    ids = [update(frame) for frame in frames[:HISTORY]]
    stopwatch = Stopwatch()
    for frame in frames[HISTORY:]:
        with stopwatch:
            ids.append(update(frame))
    return [1000 * each for each in stopwatch.wall_s], [1000 * each for each in stopwatch.cpu_s], ids


def _naive_ids(tracker: NaiveTracker, frame: FrameDetections) -> list[int]:
    return tracker.update(*frame)


def _our_ids(tracker: Tracker, frame: FrameDetections) -> list[int]:
    return tracker.update(*frame).ids.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--frames", type=int, default=30, help="frames timed after the history is full")
    parser.add_argument("--threads", type=int, default=min(2, cores_allowed()))
    add_flags(parser, "20 objects, 5 frames")
    args = parser.parse_args()
    if args.quick:
        args.objects, args.frames = [20], 5
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recorder = Recorder("tracker", "Tracker without the detector", args)
    for objects in args.objects:
        model = full_size_model(max(50, objects))
        count = args.frames if objects < CROWD else -(-args.frames // 3)
        frames = scripted_detections(objects, HISTORY + count)
        naive, ours = NaiveTracker(model), Tracker(model, SETTINGS, (1080, 1920))
        # Not interleaved, so that the two do not share caches.
        naive_ms, naive_cpu, naive_ids = timed(partial(_naive_ids, naive), frames)
        ours_ms, ours_cpu, ours_ids = timed(partial(_our_ids, ours), frames)
        if naive_ids != ours_ids:
            raise SystemExit(f"the ids of the two trackers differ with {objects} objects")
        recorder.add(
            f"{objects} objects",
            {"history": HISTORY, "threads": args.threads, "ID labels": max(50, objects), "frames timed": count},
            "the naive form with nn.MultiheadAttention",
            [
                quantity("ms per frame", ours_ms, naive_ms),
                # Steadier while other programs share the cores.
                quantity("CPU ms per frame", ours_cpu, naive_cpu),
            ],
        )
    recorder.finish()


if __name__ == "__main__":
    main()
