"""Aerial domain: a drone over roads and squares, with small objects seen from above."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from motip.demo.rendering import Canvas, Label, Lighting, Sprite, blotches
from motip.demo.sprites import Costume, car_above, hsv, person_above, tree_above

FPS = 15.0
POSES = 6
_VEHICLES = ("car", "van", "truck", "bus")
_SPREAD = 1.1
"""Extra size of the terrain on each axis, in frame sizes, for the motion of the camera."""


@dataclass(slots=True)
class _Road:
    """A straight road over the terrain: a point on it, its direction (radians) and its breadth in pixels."""

    x: float
    y: float
    angle: float
    breadth: float

    def distance(self, x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
        """Distance from the road's middle, pixels."""
        return np.abs(-np.sin(self.angle) * (np.asarray(x) - self.x) + np.cos(self.angle) * (np.asarray(y) - self.y))


@dataclass(slots=True)
class _Mover:
    """Terrain position (T, 2) and heading (T,) of one object over all frames."""

    category: str
    position: np.ndarray
    heading: np.ndarray
    pace: float


class AerialScene:
    """7 to 14 vehicles and people in view, 17 to 36 pixels; 20 to 38 in a crowd. Trees occlude objects below."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], frames: int, crowd: bool) -> None:
        """``size`` is (H, W); ``crowd`` puts 20 to 38 objects in view, most of them people."""
        self._height, self._width = size
        self._unit = min(size[0] / 128, size[1] / 224)
        self._span = (round(size[1] * (1 + _SPREAD)), round(size[0] * (1 + _SPREAD)))
        self._lighting = Lighting(rng, size, gain=(0.75, 1.25), contrast=0.15, flicker=0.02, noise=3)
        self._fly(rng, frames)
        self._roads = self._lay_roads(rng)
        self._lot = self._place_lot(rng) if rng.random() < 0.4 else None
        self._terrain = self._draw_terrain(rng)
        self._trees = self._plant_trees(rng)
        movers = self._vehicles(rng, frames) + self._people(rng, frames, crowd)
        self._movers = self._populate(rng, movers, crowd)
        self._sprites = [self._draw_mover(rng, mover.category) for mover in self._movers]
        self._positions = np.stack([mover.position for mover in self._movers])

    def _fly(self, rng: np.random.Generator, frames: int) -> None:
        """Camera motion: terrain point, rotation and zoom per frame."""
        time = np.arange(frames) / FPS
        width, height = self._span
        reach = 0.42 * _SPREAD * np.array([self._width, self._height])
        rate = rng.uniform(0.01, 0.05, 2)
        self._centre = np.array([width, height]) / 2 + reach * np.sin(
            time[:, None] * 2 * np.pi * rate + rng.uniform(0, 6, 2)
        )
        self._turn = rng.uniform(0, 0.2) * np.sin(rng.uniform(0.1, 0.3) * time + rng.uniform(0, 6))
        self._zoom = rng.uniform(0.95, 1.15) * (1 + 0.06 * np.sin(rng.uniform(0.1, 0.4) * time + rng.uniform(0, 6)))

    def _lay_roads(self, rng: np.random.Generator) -> list[_Road]:
        width, height = self._span
        base = rng.uniform(0, np.pi)
        roads = []
        for number in range(int(rng.integers(2, 4)) + 1):
            angle = base + (np.pi / 2 if number % 2 else 0) + rng.normal(0, 0.15)
            x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
            roads.append(_Road(x, y, angle, rng.uniform(38, 46) * self._unit))
        return roads

    def _place_lot(self, rng: np.random.Generator) -> tuple[float, float, float, float] | None:
        """A car park away from the roads, which the dataset labels as an ignored region: x1, y1, x2, y2."""
        width, height = rng.uniform(34, 60) * self._unit, rng.uniform(24, 40) * self._unit
        for _ in range(40):
            x, y = rng.uniform(0.1, 0.9) * self._span[0], rng.uniform(0.1, 0.9) * self._span[1]
            if all(road.distance(x, y) > road.breadth / 2 + (width + height) / 2.4 for road in self._roads):
                return x - width / 2, y - height / 2, x + width / 2, y + height / 2
        return None

    def _draw_terrain(self, rng: np.random.Generator) -> np.ndarray:
        width, height = self._span
        hue = rng.choice([rng.uniform(0.05, 0.15), rng.uniform(0.2, 0.35), rng.uniform(0.9, 1.1)])
        soil = np.array(
            [hsv(hue + rng.normal(0, 0.03), rng.uniform(0.1, 0.3), rng.uniform(0.42, 0.52)) for _ in "123456"]
        )
        terrain = blotches(rng, height, width, 22 * self._unit, soil)
        # Buildings.
        for _ in range(rng.integers(3, 8)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            size_x, size_y = rng.uniform(20, 60, 2) * self._unit
            if any(road.distance(x, y) < road.breadth / 2 + (size_x + size_y) / 2.6 for road in self._roads):
                continue
            corners = (round(x - size_x / 2), round(y - size_y / 2)), (round(x + size_x / 2), round(y + size_y / 2))
            colour = hsv(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.35, 0.7))
            cv2.rectangle(terrain, *corners, tuple(value // 2 for value in colour), max(1, round(3 * self._unit)))
            cv2.rectangle(terrain, *corners, colour, -1)
        # Roads and lane markings.
        grey = rng.uniform(75, 125)
        for road in self._roads:
            along = np.array([np.cos(road.angle), np.sin(road.angle)]) * 3 * (width + height)
            start, end = (np.array([road.x, road.y]) + sign * along for sign in (-1, 1))
            breadth = round(road.breadth)
            cv2.line(terrain, start.astype(int).tolist(), end.astype(int).tolist(), (grey, grey, grey + 4), breadth)
        for road in self._roads:
            step = np.array([np.cos(road.angle), np.sin(road.angle)]) * 6 * self._unit
            for number in range(-150, 150, 2):
                start, end = (np.array([road.x, road.y]) + (number + extra) * step for extra in (0, 1))
                cv2.line(terrain, start.astype(int).tolist(), end.astype(int).tolist(), (205, 210, 215), 1)
        # Car park.
        if self._lot is not None:
            x1, y1, x2, y2 = (round(value) for value in self._lot)
            cv2.rectangle(terrain, (x1, y1), (x2, y2), (95, 92, 90), -1)
            for x in np.arange(x1 + 4 * self._unit, x2 - 8 * self._unit, 10 * self._unit):
                for y in np.arange(y1 + 3 * self._unit, y2 - 12 * self._unit, 15 * self._unit):
                    corner = (round(x + 7 * self._unit), round(y + 11 * self._unit))
                    colour = hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.2, 0.9))
                    cv2.rectangle(terrain, (round(x), round(y)), corner, colour, -1)
        return terrain

    def _plant_trees(self, rng: np.random.Generator) -> list[tuple[float, float, Sprite]]:
        kinds = [tree_above(rng, radius * self._unit) for radius in (9, 12, 15)]
        trees = []
        for _ in range(int(rng.integers(3, 8))):
            road = self._roads[rng.integers(len(self._roads))]
            along = rng.uniform(-0.7, 0.7) * max(self._span)
            aside = rng.choice([-1, 1]) * (rng.uniform(0.3, 1.2) * road.breadth + 4 * self._unit)
            x = road.x + along * np.cos(road.angle) - aside * np.sin(road.angle)
            y = road.y + along * np.sin(road.angle) + aside * np.cos(road.angle)
            trees.append((float(x), float(y), kinds[rng.integers(len(kinds))]))
        return trees

    def _vehicles(self, rng: np.random.Generator, frames: int) -> list[_Mover]:
        """Traffic on every lane, with one speed per lane."""
        time = np.arange(frames) / FPS
        movers = []
        for road in self._roads:
            for side in (-1, 1):
                pace = rng.uniform(6, 22) * self._unit
                position = -1.2 * max(self._span) - pace * frames / FPS
                while position < 1.2 * max(self._span):
                    position += rng.uniform(52, 110) * self._unit
                    category = str(rng.choice(["car", "van", "truck", "bus"], p=[0.85, 0.12, 0.015, 0.015]))
                    sway = rng.uniform(0, 6) * np.sin(rng.uniform(0.3, 1.2) * time + rng.uniform(0, 6)) * self._unit
                    along = side * (position + pace * time + sway)
                    aside = side * (0.24 * road.breadth + rng.normal(0, 0.6) * self._unit)
                    x = road.x + along * np.cos(road.angle) - aside * np.sin(road.angle)
                    y = road.y + along * np.sin(road.angle) + aside * np.cos(road.angle)
                    heading = np.full(frames, road.angle + (0 if side > 0 else np.pi))
                    movers.append(_Mover(category, np.stack([x, y], 1), heading, 0))
        return movers

    def _people(self, rng: np.random.Generator, frames: int, crowd: bool) -> list[_Mover]:
        """Groups that walk together and single people, some of them sitting, a few with a cart."""
        time = np.arange(frames) / FPS
        movers: list[_Mover] = []
        target = 520 if crowd else 160
        while len(movers) < target:
            start = rng.uniform(-0.1, 1.1, 2) * np.array(self._span)
            direction, pace = rng.uniform(-np.pi, np.pi), rng.uniform(3, 11) * self._unit
            bend = rng.normal(0, 0.12)
            angles = direction + bend * time
            steps = np.stack([np.cos(angles), np.sin(angles)], 1) * pace / FPS
            middle = start + np.cumsum(steps, axis=0)
            members = int(rng.integers(4, 15)) if crowd and rng.random() < 0.7 else int(rng.integers(1, 4))
            spacing = rng.uniform(15, 19) * np.sqrt(members) * 0.6 * self._unit
            for _ in range(members):
                wobble = rng.uniform(1, 4) * self._unit
                phases = rng.uniform(0, 6, 2)
                own = np.stack([np.sin(rng.uniform(0.4, 1.5) * time + phase) for phase in phases], 1) * wobble
                position = middle + rng.normal(0, spacing, 2) + own
                category = str(rng.choice(["pedestrian", "people", "others"], p=[0.88, 0.09, 0.03]))
                if category == "people":
                    position = np.broadcast_to(position[:1], position.shape) + 0.15 * own
                movers.append(_Mover(category, position, angles, pace))
        return movers

    def _draw_mover(self, rng: np.random.Generator, category: str) -> list[Sprite]:
        """Sprites of its poses: several for people, one for other objects."""
        if category in ("pedestrian", "people"):
            size, costume = rng.uniform(17, 20) * self._unit, Costume.random(rng)
            return [person_above(size, costume, 2 * np.pi * k / POSES) for k in range(POSES)]
        length, width = {
            "car": (rng.uniform(28, 34), rng.uniform(15, 17)),
            "van": (rng.uniform(32, 36), rng.uniform(16, 18)),
            "truck": (rng.uniform(42, 50), rng.uniform(16, 18)),
            "bus": (rng.uniform(52, 60), rng.uniform(17, 18)),
            "others": (14.0, 10.0),
        }[category]
        colour = hsv(rng.random(), rng.choice([0.05, rng.uniform(0.5, 1)]), rng.choice([0.22, rng.uniform(0.7, 1)]))
        return [car_above(length * self._unit, width * self._unit, colour, category)]

    def _populate(self, rng: np.random.Generator, movers: list[_Mover], crowd: bool) -> list[_Mover]:
        """A subset of the movers that keeps the number in view within its bounds, vehicles first."""
        low, high = (20, 38) if crowd else (7, 14)
        target = rng.uniform(23, 31) if crowd else rng.uniform(8, 12)
        vehicle_share = rng.uniform(0.15, 0.3) if crowd else rng.uniform(0.35, 0.65)
        vehicles = [mover for mover in movers if mover.category in _VEHICLES]
        walkers = [mover for mover in movers if mover.category not in _VEHICLES]
        in_view = np.zeros(len(self._zoom), np.int64)
        chosen: list[_Mover] = []
        # Pedestrians keep their order, so that groups stay together.
        candidates = [vehicles[index] for index in rng.permutation(len(vehicles))]
        for kind, limit in ((candidates, vehicle_share * target), (walkers, target)):
            for mover in kind:
                x, y = self._to_frame(mover.position, slice(None))
                inside = (x > 0) & (x < self._width) & (y > 0) & (y < self._height)
                if not inside.any() or (in_view + inside).max() > high or self._crosses_lot(mover):
                    continue
                if in_view.mean() >= limit:
                    if kind is candidates or in_view.min() >= low:
                        break
                    if not inside[in_view.argmin()]:
                        continue
                chosen.append(mover)
                in_view += inside
        return chosen

    def _crosses_lot(self, mover: _Mover) -> bool:
        if self._lot is None:
            return False
        x1, y1, x2, y2 = self._lot
        x, y = mover.position.T
        margin = 12 * self._unit
        return bool(np.any((x > x1 - margin) & (x < x2 + margin) & (y > y1 - margin) & (y < y2 + margin)))

    def _to_frame(self, position: np.ndarray, frame: int | slice) -> tuple[np.ndarray, np.ndarray]:
        """Frame pixels of terrain points (..., 2)."""
        offset = position - self._centre[frame]
        cos, sin = self._zoom[frame] * np.cos(self._turn[frame]), self._zoom[frame] * np.sin(self._turn[frame])
        x = cos * offset[..., 0] - sin * offset[..., 1] + self._width / 2
        y = sin * offset[..., 0] + cos * offset[..., 1] + self._height / 2
        return x, y

    def render(self, frame: int) -> tuple[np.ndarray, list[Label], int]:
        """(H, W, 3) uint8 BGR, the labels, and the number of objects without a box because they are occluded."""
        # Terrain as the camera sees it.
        zoom, turn = self._zoom[frame], self._turn[frame]
        cos, sin = zoom * np.cos(turn), zoom * np.sin(turn)
        centre_x, centre_y = self._centre[frame]
        matrix = np.array(
            [
                [cos, -sin, self._width / 2 - cos * centre_x + sin * centre_y],
                [sin, cos, self._height / 2 - sin * centre_x - cos * centre_y],
            ]
        )
        ground = cv2.warpAffine(
            self._terrain, matrix, (self._width, self._height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        canvas = Canvas(ground.astype(np.float32))
        # Objects, then trees above them.
        x, y = self._to_frame(self._positions[:, frame], frame)
        margin = 30 * self._unit
        near = (x > -margin) & (x < self._width + margin) & (y > -margin) & (y < self._height + margin)
        for index in np.nonzero(near)[0].tolist():
            mover, poses = self._movers[index], self._sprites[index]
            canvas.paint(
                poses[int(frame * mover.pace / (6 * self._unit)) % len(poses)],
                float(x[index]),
                float(y[index]),
                scale=float(zoom),
                angle=float(mover.heading[frame] + turn),
                track_id=index + 1,
                category=mover.category,
            )
        for tree_x, tree_y, sprite in self._trees:
            canvas_x, canvas_y = self._to_frame(np.array([tree_x, tree_y]), frame)
            canvas.paint(sprite, float(canvas_x), float(canvas_y), scale=float(zoom), angle=float(turn))
        if self._lot is not None:
            x1, y1, x2, y2 = self._lot
            corners_x, corners_y = self._to_frame(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]), frame)
            canvas.add_region("ignored", (corners_x.min(), corners_y.min(), corners_x.max(), corners_y.max()))
        labels, hidden = canvas.labels()
        return self._lighting.apply(canvas.image, frame), labels, hidden
