"""Dance domain: a group in similar costumes on a stage, with frequent crossings."""

from __future__ import annotations

import cv2
import numpy as np

from motip.demo.rendering import Canvas, Label, Lighting, Sprite, blotches
from motip.demo.sprites import Costume, hsv, person_side, post

FPS = 20.0
POSES = 12


class DanceScene:
    """4 to 8 pedestrians, 36 to 62 pixels tall at 128×224, with crossings, occlusions, exits and re-entries."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], frames: int, crowd: bool) -> None:
        """``size`` is (H, W); ``crowd`` fills the stage with 8 to 12 instead."""
        self._height, self._width = size
        unit = min(size[0] / 128, size[1] / 224)
        self._count = int(rng.integers(8, 13)) if crowd else int(rng.integers(4, 9))
        self._lighting = Lighting(rng, size, gain=(0.75, 1.2), contrast=0.35, flicker=0.08, noise=3)
        self._camera(rng, frames, unit)
        self._stage = self._draw_stage(rng, unit)
        self._feet, self._x, self._steps = self._choreograph(rng, frames)
        troupe = Costume.random(rng)
        alike = rng.random() < 0.75
        self._dancers: list[list[Sprite]] = []
        for _ in range(self._count):
            costume = troupe.varied(rng, 14) if alike else Costume.random(rng)
            build, arms = rng.uniform(0.85, 1.2), rng.uniform(0.3, 1)
            self._dancers.append(
                [person_side(62 * unit, costume, 2 * np.pi * k / POSES, arms, build) for k in range(POSES)]
            )
        self._sizes = rng.uniform(0.92, 1.08, self._count)
        self._pillars = [
            (rng.uniform(0.15, 0.85) * self._width, post(rng.uniform(9, 17) * unit, 1.2 * self._height, (28, 24, 26)))
            for _ in range(rng.integers(0, 3))
        ]

    def _camera(self, rng: np.random.Generator, frames: int, unit: float) -> None:
        time = np.arange(frames) / FPS
        sway = rng.uniform(1, 7) * unit
        self._pan = sway * np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * time + rng.uniform(0, 6))
        self._tilt = 0.3 * sway * np.sin(2 * np.pi * rng.uniform(0.1, 0.5) * time + rng.uniform(0, 6))
        self._zoom = 1 + 0.05 * np.sin(2 * np.pi * rng.uniform(0.05, 0.2) * time + rng.uniform(0, 6))

    def _draw_stage(self, rng: np.random.Generator, unit: float) -> np.ndarray:
        """Background, larger than the frame by the range of the camera motion."""
        margin = round(20 * unit)
        height, width = self._height + 2 * margin, self._width + 2 * margin
        hue = rng.random()
        palette = np.array(
            [hsv(hue + rng.normal(0, 0.12), rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.45)) for _ in "12345"]
        )
        stage = blotches(rng, height, width, 20 * unit, palette)
        for _ in range(rng.integers(1, 5)):
            centre = (int(rng.integers(width)), int(rng.integers(height // 2)))
            colour = hsv(hue + 0.5 + rng.normal(0, 0.1), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.7))
            cv2.circle(stage, centre, round(rng.uniform(8, 36) * unit), colour, -1, cv2.LINE_AA)
        floor = margin + round(rng.uniform(0.5, 0.62) * self._height)
        stage[floor:] = (stage[floor:] * rng.uniform(0.4, 0.8)).astype(np.uint8)
        cv2.line(stage, (0, floor), (width, floor), hsv(hue, 0.2, 0.6), max(1, round(unit)))
        self._margin = margin
        return stage

    def _choreograph(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth on the stage (0..1), x in pixels and step phase, each (dancer, frame)."""
        count, time = self._count, np.arange(frames)
        slots = (np.arange(count) + 0.5) / count * 0.84 + 0.08
        beat = rng.uniform(50, 90)
        beats = int(np.ceil(frames / beat)) + 3
        x, depth = np.empty((count, frames)), np.empty((count, frames))
        order = rng.permutation(count)
        positions = np.empty((beats, count))
        for number in range(beats):
            # Some dancers swap positions at every beat, so that there are always crossings.
            movers = rng.permutation(count)[: max(2, round(count * rng.uniform(0.4, 1)))]
            order[movers] = order[np.roll(movers, 1)]
            positions[number] = slots[order] + rng.normal(0, 0.03, count)
        away = rng.random((beats, count)) < 0.06
        positions[away] = np.where(rng.random(int(away.sum())) < 0.5, -0.25, 1.25)
        depths = rng.uniform(0, 1, (beats, count))
        for dancer in range(count):
            knots = (np.arange(beats) - 1) * beat + rng.uniform(-0.3, 0.3) * beat
            x[dancer] = _glide(time, knots, positions[:, dancer])
            depth[dancer] = _glide(time, knots, depths[:, dancer])
        x += 0.012 * np.sin(time * rng.uniform(0.2, 0.5, (count, 1)) + rng.uniform(0, 6, (count, 1)))
        tempo = rng.uniform(0.25, 0.55)
        steps = tempo * time + rng.uniform(0, 0.8, (count, 1))
        return depth, x * self._width, steps

    def render(self, frame: int) -> tuple[np.ndarray, list[Label], int]:
        """(H, W, 3) uint8 BGR, the labels, and the number of dancers without a box because they are occluded."""
        zoom, pan, tilt = self._zoom[frame], self._pan[frame], self._tilt[frame]
        middle_x, middle_y = self._width / 2, self._height / 2
        matrix = np.array(
            [
                [zoom, 0, middle_x + pan - zoom * (middle_x + self._margin)],
                [0, zoom, middle_y + tilt - zoom * (middle_y + self._margin)],
            ]
        )
        backdrop = cv2.warpAffine(
            self._stage, matrix, (self._width, self._height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        canvas = Canvas(backdrop.astype(np.float32))
        depth = self._feet[:, frame]
        for dancer in np.argsort(depth, kind="stable"):
            near = depth[dancer]
            x = middle_x + zoom * (self._x[dancer, frame] - middle_x) + pan
            feet = (0.72 + 0.22 * near) * self._height
            y = middle_y + zoom * (feet - middle_y) + tilt
            pose = int(self._steps[dancer, frame] / (2 * np.pi) * POSES) % POSES
            scale = (0.6 + 0.4 * near) * self._sizes[dancer] * zoom
            canvas.paint(
                self._dancers[dancer][pose], x, y, scale=scale, track_id=int(dancer) + 1, category="pedestrian"
            )
        for position, pillar in self._pillars:
            canvas.paint(pillar, middle_x + 1.25 * zoom * (position - middle_x) + 1.25 * pan, 1.05 * self._height)
        labels, hidden = canvas.labels()
        return self._lighting.apply(canvas.image, frame), labels, hidden


def _glide(time: np.ndarray, knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at ``time`` interpolated between knots, with easing and a pause for a third of each interval."""
    after = np.clip(np.searchsorted(knots, time, side="right"), 1, len(knots) - 1)
    share = np.clip((time - knots[after - 1]) / (knots[after] - knots[after - 1]), 0, 1)
    share = np.clip(share / 0.67, 0, 1)
    eased = share * share * (3 - 2 * share)
    return values[after - 1] + (values[after] - values[after - 1]) * eased
