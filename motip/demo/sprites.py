"""Sprites of the three domains: people and vehicles, seen from the side and from above."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

from motip.demo.rendering import Sprite, make_sprite

_SUPERSAMPLE = 3
Colour = tuple[int, int, int]
_SKINS: tuple[Colour, ...] = ((150, 185, 225), (110, 150, 205), (70, 105, 160), (50, 75, 115))


class Pencil:
    """Draws colour and mask of a sprite, in sprite pixels, enlarged ``_SUPERSAMPLE`` times."""

    def __init__(self, width: float, height: float) -> None:
        self._width, self._height = width, height
        shape = (int(np.ceil(height * _SUPERSAMPLE)), int(np.ceil(width * _SUPERSAMPLE)))
        self._bgr = np.zeros((*shape, 3), np.uint8)
        self._mask = np.zeros(shape, np.uint8)

    def _points(self, points: list[tuple[float, float]]) -> np.ndarray:
        return np.round(np.array(points) * _SUPERSAMPLE).astype(np.int32)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        for target, value in ((self._bgr, colour), (self._mask, (255,))):
            cv2.fillPoly(target, [self._points(points)], value)

    def box(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        self.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], colour)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        centre = tuple(int(value) for value in self._points([(x, y)])[0])
        axes = (max(1, round(radius_x * _SUPERSAMPLE)), max(1, round(radius_y * _SUPERSAMPLE)))
        for target, value in ((self._bgr, colour), (self._mask, (255,))):
            cv2.ellipse(target, centre, axes, 0, 0, 360, value, -1)

    def limb(self, start: tuple[float, float], end: tuple[float, float], width: float, colour: Colour) -> None:
        first, last = (tuple(int(value) for value in point) for point in self._points([start, end]))
        for target, value in ((self._bgr, colour), (self._mask, (255,))):
            cv2.line(target, first, last, value, max(1, round(width * _SUPERSAMPLE)))

    def sprite(self, anchor: tuple[float, float]) -> Sprite:
        return make_sprite(self._bgr, self._mask, (anchor[0] * _SUPERSAMPLE, anchor[1] * _SUPERSAMPLE), _SUPERSAMPLE)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """BGR colour 0..255 from hue, saturation and value in 0..1 (hue wraps, the others are clipped)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(blue * 255), round(green * 255), round(red * 255)


@dataclass(frozen=True, slots=True)
class Costume:
    """Colours of a person: top, trousers, skin and hair."""

    top: Colour
    trousers: Colour
    skin: Colour
    hair: Colour

    @staticmethod
    def random(rng: np.random.Generator) -> Costume:
        return Costume(
            hsv(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.3, 1)),
            hsv(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.8)),
            _SKINS[rng.integers(len(_SKINS))],
            hsv(0.08, 0.6, rng.uniform(0.05, 0.5)),
        )

    def varied(self, rng: np.random.Generator, spread: float) -> Costume:
        """The same costume with slightly different colours, for the members of a group."""

        def shift(colour: Colour) -> Colour:
            blue, green, red = (int(np.clip(value + rng.normal(0, spread), 0, 255)) for value in colour)
            return blue, green, red

        return Costume(shift(self.top), shift(self.trousers), _SKINS[rng.integers(len(_SKINS))], shift(self.hair))


def person_side(height: float, costume: Costume, phase: float, arms: float = 0.4, build: float = 1.0) -> Sprite:
    """A person seen from the side or front, anchored at the feet.

    Args:
        height: pixels from head to feet.
        phase: of the step, radians; legs and arms swing with it.
        arms: how far the arms swing, 0 (hanging) to 1 (up to the head).
        build: relative breadth.
    """
    width = 0.62 * height
    pencil = Pencil(width, height)
    middle, unit = width / 2, height
    swing = np.sin(phase)
    hip, shoulder, head = 0.55 * unit, 0.24 * unit, 0.095 * unit
    leg, arm = 0.105 * unit * build, 0.075 * unit * build
    for side in (-1, 1):
        foot = middle + side * (0.07 + 0.09 * swing * side) * unit
        pencil.limb((middle + side * 0.05 * unit, hip), (foot, unit - leg / 2), leg, costume.trousers)
    for side in (-1, 1):
        raised = arms * (0.5 + 0.5 * np.sin(phase + (0 if side > 0 else 1.3)))
        elbow = (middle + side * (0.17 + 0.08 * raised) * unit, shoulder + (0.22 - 0.34 * raised) * unit)
        pencil.limb((middle + side * 0.09 * unit * build, shoulder), elbow, arm, costume.skin)
    breadth = 0.125 * unit * build
    pencil.polygon(
        [
            (middle - breadth, shoulder - 0.04 * unit),
            (middle + breadth, shoulder - 0.04 * unit),
            (middle + 0.8 * breadth, hip + 0.04 * unit),
            (middle - 0.8 * breadth, hip + 0.04 * unit),
        ],
        costume.top,
    )
    pencil.ellipse(middle, head, 0.075 * unit, 0.095 * unit, costume.hair)
    pencil.ellipse(middle, head + 0.02 * unit, 0.06 * unit, 0.075 * unit, costume.skin)
    return pencil.sprite((middle, unit))


def car_ground(width: float, colour: Colour, view: str, tall: float = 1.0) -> Sprite:
    """A car at street level, anchored where the wheels touch the road.

    Args:
        width: visible width in pixels: of the rear or front, or the full length in the side view.
        view: rear, front or side.
        tall: relative height (vans and trucks above 1).
    """
    glass, tyre = (70, 60, 50), (25, 25, 25)
    darker = (colour[0] * 2 // 3, colour[1] * 2 // 3, colour[2] * 2 // 3)
    # Side view.
    if view == "side":
        height = 0.36 * width * tall
        pencil = Pencil(width, height)
        pencil.polygon(
            [(0.18 * width, 0.5 * height), (0.3 * width, 0), (0.76 * width, 0), (0.9 * width, 0.5 * height)], colour
        )
        pencil.box(0.31 * width, 0.1 * height, 0.51 * width, 0.45 * height, glass)
        pencil.box(0.55 * width, 0.1 * height, 0.75 * width, 0.45 * height, glass)
        pencil.box(0, 0.45 * height, width, 0.85 * height, colour)
        for wheel in (0.2, 0.8):
            pencil.ellipse(wheel * width, 0.83 * height, 0.09 * width, 0.17 * height, tyre)
        return pencil.sprite((width / 2, height))
    # Front or rear.
    height = 0.8 * width * tall
    pencil = Pencil(width, height)
    pencil.polygon(
        [(0.06 * width, 0.45 * height), (0.18 * width, 0), (0.82 * width, 0), (0.94 * width, 0.45 * height)], colour
    )
    pencil.polygon(
        [
            (0.14 * width, 0.42 * height),
            (0.23 * width, 0.08 * height),
            (0.77 * width, 0.08 * height),
            (0.86 * width, 0.42 * height),
        ],
        glass,
    )
    pencil.box(0, 0.42 * height, width, 0.88 * height, colour)
    pencil.box(0.25 * width, 0.68 * height, 0.75 * width, 0.85 * height, darker)
    lamp: Colour = (40, 30, 235) if view == "rear" else (200, 250, 255)
    for left in (0.04, 0.78):
        pencil.box(left * width, 0.5 * height, (left + 0.18) * width, 0.64 * height, lamp)
        pencil.box((left + 0.02) * width, 0.86 * height, (left + 0.15) * width, height, tyre)
    return pencil.sprite((width / 2, height))


def car_above(length: float, width: float, colour: Colour, kind: str) -> Sprite:
    """A vehicle from above, driving to the right, anchored at its centre. ``kind``: car, van, truck or bus."""
    pencil = Pencil(length, width)
    glass = (60, 50, 40)
    round_off = 0.18 * width
    pencil.polygon(
        [
            *((round_off, 0), (length - round_off, 0), (length, round_off), (length, width - round_off)),
            *((length - round_off, width), (round_off, width), (0, width - round_off), (0, round_off)),
        ],
        colour,
    )
    if kind == "truck":
        pencil.box(0, 0.05 * width, 0.7 * length, 0.95 * width, (200, 205, 210))
        pencil.box(0.86 * length, 0.12 * width, 0.94 * length, 0.88 * width, glass)
    elif kind == "bus":
        for start in (0.15, 0.45, 0.7):
            pencil.box(start * length, 0.3 * width, (start + 0.12) * length, 0.7 * width, (190, 200, 210))
        pencil.box(0.93 * length, 0.08 * width, 0.98 * length, 0.92 * width, glass)
    else:
        front = 0.8 if kind == "van" else 0.72
        pencil.box((front - 0.12) * length, 0.14 * width, front * length, 0.86 * width, glass)
        pencil.box(0.1 * length, 0.18 * width, 0.2 * length, 0.82 * width, glass)
    return pencil.sprite((length / 2, width / 2))


def person_above(size: float, costume: Costume, phase: float) -> Sprite:
    """A person from above, walking to the right, anchored at the centre; ``size`` is the breadth in pixels."""
    pencil = Pencil(size, size)
    middle = size / 2
    swing = 0.14 * size * np.sin(phase)
    for side in (-1, 1):
        pencil.ellipse(middle + side * swing, middle + side * 0.2 * size, 0.2 * size, 0.13 * size, costume.trousers)
    pencil.ellipse(middle, middle, 0.34 * size, 0.47 * size, costume.top)
    pencil.ellipse(middle + 0.04 * size, middle, 0.19 * size, 0.19 * size, costume.hair)
    return pencil.sprite((middle, middle))


def tree_above(rng: np.random.Generator, radius: float) -> Sprite:
    """A tree top from above that occludes objects below, anchored at its centre."""
    pencil = Pencil(2 * radius, 2 * radius)
    hue, value = rng.uniform(0.2, 0.38), rng.uniform(0.25, 0.45)
    for _ in range(9):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45) * radius
        shade = hsv(hue + rng.normal(0, 0.01), 0.6, value + rng.normal(0, 0.06))
        extent = rng.uniform(0.4, 0.55) * radius
        pencil.ellipse(radius + reach * np.cos(angle), radius + reach * np.sin(angle), extent, extent, shade)
    return pencil.sprite((radius, radius))


def post(width: float, height: float, colour: Colour) -> Sprite:
    """A lamp post, pillar or trunk, anchored at its foot."""
    pencil = Pencil(width, height)
    pencil.box(0, 0, width, height, colour)
    pencil.box(
        0, 0, 0.3 * width, height, (min(colour[0] + 30, 255), min(colour[1] + 30, 255), min(colour[2] + 30, 255))
    )
    return pencil.sprite((width / 2, height))
