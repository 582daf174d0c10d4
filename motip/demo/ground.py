"""Ground domain: a dashboard camera in a street, in perspective."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from motip.demo.rendering import Canvas, Label, Lighting, Sprite, blotches
from motip.demo.sprites import Costume, car_ground, hsv, person_side, post

FPS = 5.0
_CAMERA_HEIGHT = 1.5
"""Metres above the road."""
NEAR, FAR = 4.0, 18.0
"""Range in which objects exist, in metres; beyond it they are too small to label."""
_PERIOD = 24.0
"""Metres after which the road's texture repeats."""
_PIXELS_PER_METRE = 10
_STREET_HALF = 10.0
"""Half the width of the street texture, in metres."""
POSES = 8


@dataclass(slots=True)
class _Thing:
    """An object on the street: x metres right of the camera axis, z metres ahead, and its velocity in m/s."""

    track_id: int
    category: str
    view: str
    poses: list[Sprite]
    metres_tall: float
    x: float
    z: float
    speed_x: float
    speed_z: float
    region: bool = False
    age: int = 0


class GroundScene:
    """4 to 8 cars and pedestrians seen while driving; street furniture occludes some of them temporarily."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], frames: int, crowd: bool) -> None:
        """``size`` is (H, W); ``crowd`` keeps 9 to 14 objects in the street instead."""
        self._height, self._width = size
        self._unit = min(size[0] / 128, size[1] / 224)
        self._focal = 223 * self._unit
        self._rng = rng
        self._target = int(rng.integers(10, 15)) if crowd else int(rng.integers(5, 10))
        self._lighting = Lighting(rng, size, gain=(0.7, 1.25), contrast=0.12, flicker=0.03, noise=3)
        self._next_id = 1
        time = np.arange(frames) / FPS
        pace = rng.choice([0.0, rng.uniform(0.4, 1.2), rng.uniform(1, 2.2)], p=[0.2, 0.4, 0.4])
        self._speed = np.maximum(0, pace * (1 + 0.5 * np.sin(rng.uniform(0.2, 0.7) * time + rng.uniform(0, 6))))
        self._travelled = np.cumsum(self._speed) / FPS
        self._yaw = rng.uniform(2, 8) * self._unit * np.sin(rng.uniform(0.2, 0.8) * time + rng.uniform(0, 6))
        shake = rng.normal(0, 0.35, frames) * self._unit * (pace > 0)
        self._horizon = rng.uniform(0.38, 0.46) * self._height + shake
        self._street = self._draw_street(rng)
        self._panorama = self._draw_panorama(rng)
        self._posts = self._plant_posts(rng)
        self._states = self._drive(frames)

    def _draw_street(self, rng: np.random.Generator) -> np.ndarray:
        """One period of the ground from above: road, markings, pavements and verge."""
        height, width = round(_PERIOD * _PIXELS_PER_METRE), round(2 * _STREET_HALF * _PIXELS_PER_METRE)
        hue = rng.uniform(0.1, 0.4)
        verge = np.array([hsv(hue + rng.normal(0, 0.04), rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.6)) for _ in "1234"])
        street = blotches(rng, height, width, 12, verge)
        grey = rng.uniform(70, 120)
        asphalt = blotches(rng, height, width, 9, np.array([[grey, grey, grey], [grey + 14, grey + 12, grey + 10]]))

        def columns(left: float, right: float) -> slice:
            return slice(*(round((_STREET_HALF + metres) * _PIXELS_PER_METRE) for metres in (left, right)))

        street[:, columns(-7.6, 6.6)] = np.clip(asphalt[:, columns(-7.6, 6.6)].astype(np.int16) + 45, 0, 255)
        street[:, columns(-5.6, 4.6)] = asphalt[:, columns(-5.6, 4.6)]
        for edge in (-5.6, 4.6):
            street[:, columns(edge - 0.1, edge + 0.1)] = 200
        for start in range(0, height, 6 * _PIXELS_PER_METRE):
            street[start : start + 3 * _PIXELS_PER_METRE, columns(-1.8, -1.6)] = 225
        if rng.random() < 0.4:
            for left in np.arange(-5.2, 4.4, 1.0):
                street[: 3 * _PIXELS_PER_METRE, columns(left, left + 0.5)] = 215
        return street

    def _draw_panorama(self, rng: np.random.Generator) -> np.ndarray:
        """Sky and buildings, wider than the frame by the range of the camera's yaw."""
        margin = round(16 * self._unit)
        height, width = round(0.55 * self._height), self._width + 2 * margin
        sky = np.array([hsv(rng.uniform(0.5, 0.65), rng.uniform(0.05, 0.5), rng.uniform(0.55, 0.95)) for _ in "123"])
        panorama = blotches(rng, height, width, 40 * self._unit, sky)
        for _ in range(rng.integers(3, 9)):
            left, breadth = int(rng.integers(-20, width)), round(rng.uniform(18, 50) * self._unit)
            top = round(height - rng.uniform(20, 50) * self._unit)
            colour = hsv(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.3, 0.75))
            cv2.rectangle(panorama, (left, top), (left + breadth, height), colour, -1)
            for row in range(top + 4, height - 3, max(4, round(9 * self._unit))):
                for column in range(left + 4, left + breadth - 3, max(4, round(8 * self._unit))):
                    shade = tuple(int(value * 0.6) for value in colour)
                    cv2.rectangle(panorama, (column, row), (column + 2, row + 3), shade, -1)
        self._margin = margin
        return panorama

    def _plant_posts(self, rng: np.random.Generator) -> list[tuple[float, float, Sprite]]:
        """Posts along the kerbs as (metres right, metres ahead within the repeating street, sprite)."""
        posts, tall = [], 100 * self._unit
        for side in (-5.9, 4.9):
            position = rng.uniform(0, 8)
            while position < 2 * _PERIOD:
                breadth = rng.choice([0.18, 0.3, 0.55])
                colour = hsv(rng.uniform(0.05, 0.12), 0.4, rng.uniform(0.2, 0.4))
                posts.append((side, position, post(breadth / 5 * tall, tall, colour)))
                position += rng.uniform(7, 16)
        return posts

    def _drive(self, frames: int) -> list[list[tuple[_Thing, float, float, int]]]:
        """Simulate the street: per frame, its objects with x, z (metres) and pose."""
        things: list[_Thing] = []
        states = []
        for _ in range(self._target):
            things.append(self._spawn(things, anywhere=True))
        if self._rng.random() < 0.3:
            things.append(self._group())
        for frame in range(frames):
            states.append([(thing, thing.x, thing.z, thing.age % POSES) for thing in things])
            for thing in things:
                thing.age += 1
                thing.x += thing.speed_x / FPS
                thing.z += (thing.speed_z - self._speed[frame]) / FPS
            things = [thing for thing in things if self._exists(thing)]
            missing = self._target - sum(not thing.region for thing in things)
            for _ in range(min(missing, 2)):
                things.append(self._spawn(things, anywhere=False))
        return states

    def _exists(self, thing: _Thing) -> bool:
        edge = 0.55 * self._width / self._focal * thing.z + 2.5
        return NEAR < thing.z < FAR + 4 and abs(thing.x) < edge

    def _spawn(self, things: list[_Thing], anywhere: bool) -> _Thing:
        """A new road user, at a distance from the others if a few attempts find one."""
        for _ in range(5):
            thing = self._draw_user(anywhere)
            if all(abs(thing.x - other.x) > 0.12 * thing.z or abs(thing.z - other.z) > 12 for other in things):
                break
        thing.track_id, self._next_id = self._next_id, self._next_id + 1
        thing.poses = self._pedestrian() if thing.category == "pedestrian" else self._car(thing)
        return thing

    def _draw_user(self, anywhere: bool) -> _Thing:
        """A random road user, anywhere in the street at the start, later entering from afar or from the side."""
        rng = self._rng
        kind = rng.choice(
            ["ahead", "oncoming", "parked", "crossing car", "walker", "crossing walker"],
            p=[0.14, 0.14, 0.10, 0.07, 0.20, 0.35],
        )
        z = rng.uniform(5, 0.8 * FAR) if anywhere else rng.uniform(0.75 * FAR, FAR)
        direction = rng.choice([-1, 1])
        # Pedestrians.
        if kind in ("walker", "crossing walker"):
            tall, category, view = rng.uniform(1.55, 1.9), "pedestrian", ""
            if kind == "walker":
                x, speed_x = direction * rng.uniform(3.6, 5.4) - 0.5, 0.0
                speed_z = rng.choice([-1, 1]) * rng.uniform(0.4, 1.2)
            else:
                z = rng.uniform(6, 14)
                x = rng.uniform(-4, 4) if anywhere else -direction * (0.5 * self._width / self._focal * z + 0.4)
                speed_x, speed_z = direction * rng.uniform(0.6, 1.3), 0.0
        else:
            # Vehicles.
            view = {"ahead": "rear", "oncoming": "front", "parked": "rear", "crossing car": "side"}[str(kind)]
            category = "truck" if rng.random() < 0.08 else "car"
            tall = 1.45 * (1.9 if category == "truck" else rng.uniform(0.95, 1.2))
            x = speed_x = speed_z = 0.0
            if kind == "ahead":
                x, speed_z = rng.normal(0.3, 0.3), float(np.mean(self._speed)) + rng.normal(0, 0.8)
            elif kind == "oncoming":
                x, speed_z = rng.normal(-3.6, 0.3), -rng.uniform(0.8, 2.5)
            elif kind == "parked":
                x = 3.6 + rng.normal(0, 0.2)
            else:
                z = rng.uniform(9, 18)
                x = rng.uniform(-5, 5) if anywhere else -direction * (0.5 * self._width / self._focal * z + 2.2)
                speed_x = direction * rng.uniform(1, 2.5)
        return _Thing(0, category, view, [], tall, float(x), float(z), float(speed_x), float(speed_z))

    def _pedestrian(self) -> list[Sprite]:
        costume, build = Costume.random(self._rng), self._rng.uniform(0.85, 1.15)
        return [person_side(48 * self._unit, costume, 2 * np.pi * k / POSES, 0.15, build) for k in range(POSES)]

    def _car(self, thing: _Thing) -> list[Sprite]:
        rng = self._rng
        colour = hsv(rng.random(), rng.choice([0.05, rng.uniform(0.3, 1)]), rng.uniform(0.15, 0.95))
        width = (130 if thing.view == "side" else 56) * self._unit
        return [car_ground(width, colour, thing.view, thing.metres_tall / 1.45)]

    def _group(self) -> _Thing:
        """A dense group of people that the dataset labels as one ``crowd``."""
        rng = self._rng
        members = [person_side(30 * self._unit, Costume.random(rng), rng.uniform(0, 6), 0.1) for _ in range(5)]
        breadth = max(member.levels[0].shape[1] for member in members)
        height = max(member.levels[0].shape[0] for member in members)
        pile = Canvas(np.zeros((height + 4, 3 * breadth, 3), np.float32))
        for member in members:
            pile.paint(member, rng.uniform(0.6, 2.4) * breadth, height + rng.uniform(0, 3))
        alpha = (pile.image.max(axis=2, keepdims=True) > 0).astype(np.float32)
        rows, columns = np.nonzero(alpha[..., 0])
        cut = np.concatenate([pile.image, alpha], axis=2)[: rows.max() + 1, columns.min() : columns.max() + 1]
        levels = tuple(
            cv2.resize(cut, (max(1, cut.shape[1] // f), max(1, cut.shape[0] // f)), interpolation=cv2.INTER_AREA)
            for f in (1, 2, 4)
        )
        sprite = Sprite(levels, (cut.shape[1] / 2, cut.shape[0]))
        position = float(rng.choice([-6.4, 5.6])), float(rng.uniform(11, 19))
        thing = _Thing(self._next_id, "pedestrian", "", [sprite], 1.8, *position, 0, 0, region=True)
        self._next_id += 1
        return thing

    def render(self, frame: int) -> tuple[np.ndarray, list[Label], int]:
        """(H, W, 3) uint8 BGR, the labels, and the number of objects without a box because they are occluded."""
        centre, horizon = self._width / 2 + self._yaw[frame], float(self._horizon[frame])
        canvas = Canvas(self._background(frame, centre, horizon).astype(np.float32))
        queue: list[tuple[float, float, _Thing | None, Sprite]] = [
            (z, x, thing, thing.poses[pose % len(thing.poses)]) for thing, x, z, pose in self._states[frame]
        ]
        for x, position, sprite in self._posts:
            z = (position - self._travelled[frame]) % (2 * _PERIOD) + 3
            if z < FAR:
                queue.append((z, x, None, sprite))
        for z, x, thing, sprite in sorted(queue, key=lambda entry: -entry[0]):
            pixels_per_metre = self._focal / z
            canvas_x, canvas_y = centre + x * pixels_per_metre, horizon + _CAMERA_HEIGHT * pixels_per_metre
            if thing is None:
                canvas.paint(sprite, canvas_x, canvas_y, scale=5 * pixels_per_metre / sprite.levels[0].shape[0])
                continue
            canvas.paint(
                sprite,
                canvas_x,
                canvas_y,
                scale=thing.metres_tall * pixels_per_metre / sprite.levels[0].shape[0],
                track_id=thing.track_id,
                category=thing.category,
                region=thing.region,
            )
        labels, hidden = canvas.labels()
        return self._lighting.apply(canvas.image, frame), labels, hidden

    def _background(self, frame: int, centre: float, horizon: float) -> np.ndarray:
        height, width = self._height, self._width
        image = np.empty((height, width, 3), np.uint8)
        edge = round(horizon)
        left = self._margin - round(centre - width / 2)
        left = min(max(left, 0), 2 * self._margin)
        image[:edge] = self._panorama[-edge:, left : left + width]
        rows = np.arange(edge, height, dtype=np.float32)[:, None]
        ahead = _CAMERA_HEIGHT * self._focal / np.maximum(rows - horizon, 0.6)
        across = (np.arange(width, dtype=np.float32)[None] - centre) * ahead / self._focal
        map_x = ((across + _STREET_HALF) * _PIXELS_PER_METRE).astype(np.float32)
        map_x = np.clip(map_x, 0, self._street.shape[1] - 1)
        # Rows of the texture run away from the camera, so travel adds to the distance.
        map_y = np.broadcast_to((ahead + self._travelled[frame]) % _PERIOD * _PIXELS_PER_METRE, map_x.shape)
        image[edge:] = cv2.remap(
            self._street, map_x, np.ascontiguousarray(map_y, np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        return image
