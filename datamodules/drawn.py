"""Drawn flowers: pictures with captions that need no download, a pure function of (seed, index, size)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from datamodules.augment import Augment
from datamodules.base import ImageDataModule, ImageTable, cached_images, content_digest
from diffusion.errors import AntherError

Array = np.ndarray
Outline = Callable[[Array], Array]

SPECIES = ("daisy", "rose", "sunflower", "tulip")
PLURALS = {"daisy": "daisies", "rose": "roses", "sunflower": "sunflowers", "tulip": "tulips"}
COUNTS = ("one", "two", "three")

# Shadow, body and highlight of each colour, sRGB.
PAINT: dict[str, Array] = {
    name: np.array(tones, np.float32)
    for name, tones in {
        "white": ((0.62, 0.65, 0.74), (0.94, 0.94, 0.96), (1.00, 1.00, 1.00)),
        "yellow": ((0.78, 0.54, 0.02), (0.99, 0.84, 0.10), (1.00, 0.96, 0.55)),
        "orange": ((0.66, 0.22, 0.02), (0.97, 0.48, 0.05), (1.00, 0.71, 0.36)),
        "red": ((0.40, 0.01, 0.05), (0.84, 0.07, 0.11), (0.98, 0.38, 0.36)),
        "pink": ((0.74, 0.22, 0.44), (0.97, 0.52, 0.71), (1.00, 0.81, 0.89)),
        "purple": ((0.25, 0.07, 0.40), (0.52, 0.21, 0.74), (0.78, 0.56, 0.94)),
        "blue": ((0.04, 0.10, 0.46), (0.16, 0.34, 0.90), (0.54, 0.72, 1.00)),
    }.items()
}
COLOURS = {
    "daisy": ("white", "yellow", "orange", "red", "pink", "purple", "blue"),
    "rose": ("white", "yellow", "orange", "red", "pink", "purple", "blue"),
    "sunflower": ("yellow", "orange", "red"),
    "tulip": ("white", "yellow", "orange", "red", "pink", "purple", "blue"),
}
GREEN = np.array(((0.07, 0.24, 0.07), (0.22, 0.50, 0.15), (0.50, 0.74, 0.30)), np.float32)
DISC = {  # the middle of a flower, in the tones of PAINT
    "daisy": np.array(((0.72, 0.42, 0.02), (0.98, 0.76, 0.10), (1.00, 0.92, 0.45)), np.float32),
    "yellow daisy": np.array(((0.50, 0.20, 0.02), (0.80, 0.40, 0.05), (0.96, 0.62, 0.20)), np.float32),
    "sunflower": np.array(((0.10, 0.05, 0.02), (0.27, 0.15, 0.06), (0.52, 0.33, 0.14)), np.float32),
}
# Sky, distance and grass: dimmer than any flower, so that every colour stands out, white and blue too.
SCENES = np.array(
    (
        ((0.52, 0.74, 0.88), (0.52, 0.70, 0.58), (0.17, 0.40, 0.15)),
        ((0.36, 0.60, 0.64), (0.32, 0.56, 0.38), (0.12, 0.32, 0.12)),
        ((0.24, 0.44, 0.32), (0.22, 0.42, 0.22), (0.09, 0.25, 0.10)),
        ((0.70, 0.68, 0.58), (0.52, 0.60, 0.38), (0.20, 0.38, 0.14)),
        ((0.44, 0.54, 0.70), (0.38, 0.54, 0.48), (0.14, 0.33, 0.18)),
    ),
    np.float32,
)


@dataclass(frozen=True)
class Flowers:
    """What a picture shows: the meaning of its caption."""

    species: str
    colour: str
    count: int

    @property
    def caption(self) -> str:
        """The plainest caption, such as "an orange tulip" or "two white daisies"."""
        if self.count == 1:
            return f"{article(self.colour)} {self.colour} {self.species}"
        return f"{COUNTS[self.count - 1]} {self.colour} {PLURALS[self.species]}"


def article(word: str) -> str:
    """The indefinite article in front of `word`."""
    return "an" if word[0] in "aeiou" else "a"


def everything() -> list[Flowers]:
    """Every meaning that can be drawn, species by species."""
    return [Flowers(s, c, n) for s in SPECIES for c in COLOURS[s] for n in (1, 2, 3)]


# Two streams, so that another phrasing never changes a picture. Meaning and picture share the first.
def _picture_rng(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, index, 0))


def _caption_rng(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, index, 1))


def _meaning(rng: np.random.Generator) -> Flowers:
    species = SPECIES[rng.integers(len(SPECIES))]
    colours = COLOURS[species]
    return Flowers(species, colours[rng.integers(len(colours))], int(rng.integers(1, 4)))


def meaning(seed: int, index: int) -> Flowers:
    """What picture `index` shows: species, then its colours, then the count, each uniform."""
    return _meaning(_picture_rng(seed, index))


# --- the canvas -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of the canvas in the units of one shape.

    Attributes:
        rgb: a view of the canvas, (3, h, w), painted in place.
        u: distance to the right of the shape's origin, (1, w) or (h, w).
        v: distance below it, (h, 1) or (h, w).
        pixel: side of a pixel in these units.
    """

    rgb: Array
    u: Array
    v: Array
    pixel: float

    @property
    def detail(self) -> float:
        """0 where fine texture would alias, 1 where it is resolved."""
        return float(np.clip((1 / self.pixel - 16) / 40, 0, 1))

    def paint(self, distance: Array, colour: Array, opacity: float | Array = 1.0, soft: float = 0.0) -> None:
        """Covers where the signed `distance` is negative; the edge is one pixel wide, or `soft` units."""
        coverage = np.clip(0.5 - distance / max(self.pixel, soft), 0, 1) * opacity
        rgb = self.rgb
        rgb += coverage * ((colour if colour.ndim == 3 else colour[:, None, None]) - rgb)


def _window(canvas: Array, x: float, y: float, unit: float, box: tuple[float, float, float, float]) -> Window:
    """The part `box` = (left, top, right, bottom), in units of the canvas, around the origin (x, y)."""
    n = canvas.shape[-1]
    left, top = (max(0, int(edge * n)) for edge in box[:2])
    right, bottom = (min(n, int(edge * n) + 1) for edge in box[2:])
    u = ((np.arange(left, right, dtype=np.float32) + 0.5) / n - x) / unit
    v = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / n - y) / unit
    return Window(canvas[:, top:bottom, left:right], u[None, :], v[:, None], 1 / (n * unit))


def _around(canvas: Array, x: float, y: float, unit: float, reach: float) -> Window:
    r = reach * unit
    return _window(canvas, x, y, unit, (x - r, y - r, x + r, y + r))


def _tone(paint: Array, tone: Array) -> Array:
    """Shadow at 0, body at 0.5, highlight at 1: (3, h, w)."""
    dark, body, light = (level[:, None, None] for level in paint)
    t = np.clip(2 * tone, 0, 2)
    mixed: Array = dark + np.minimum(t, 1) * (body - dark) + np.maximum(t - 1, 0) * (light - body)
    return mixed


def _blade(along: Array, across: Array, length: float, width: float, outline: Outline) -> tuple[Array, Array]:
    """Signed distance (about) to a leaf or petal that grows along an axis, and the position 0..1 on that axis."""
    t = np.clip(along / length, 0, 1)
    beyond = np.abs(along - t * length)
    return (np.abs(across) - width * outline(t)) * 0.85 + beyond, t


# Outlines: half-width at position t along the axis, 1 at the widest.
def _oval(t: Array) -> Array:
    return np.asarray(2 * np.sqrt(t * (1 - t)))


def _drop(t: Array) -> Array:  # round at the base, pointed at the tip
    return np.asarray(2.6 * np.sqrt(t) * (1 - t))


def _lance(t: Array) -> Array:  # pointed at both ends
    return np.asarray(4 * t * (1 - t))


# --- the flowers: each is drawn around (0, 0) with radius 1 -----------------------------------------------------------


def _petal_ring(
    w: Window, paint: Array, rng: np.random.Generator, n: int, inner: float, width: float, outline: Outline, tone: float
) -> None:
    """A ring of `n` petals from radius `inner` to 1, every one with its own light and length."""
    rho, phi = np.hypot(w.u, w.v), np.arctan2(w.v, w.u)
    turn = phi * (n / (2 * np.pi)) + rng.random(dtype=np.float32)
    which = np.floor(turn)
    angle = (turn - which - 0.5) * (2 * np.pi / n)
    which = which.astype(np.intp) % n
    length = rng.uniform(0.90, 1.0, n).astype(np.float32)[which]
    light = rng.uniform(-0.07, 0.07, n).astype(np.float32)[which]
    along, across = rho / length * np.cos(angle) - inner, rho * np.sin(angle)
    distance, t = _blade(along, across, 1 - inner, width, outline)
    # Darker at the base and along the edge, which parts neighbours; light falls from the upper left.
    edge = np.clip(1 + distance / (0.6 * width), 0, 1)
    shade = tone - 0.22 + 0.42 * t - 0.20 * edge * edge + light - 0.06 * (w.u + w.v)
    if w.detail:
        shade = shade + w.detail * 0.05 * np.cos(across / width * 9)
    w.paint(distance, _tone(paint, shade))


def _disc(w: Window, paint: Array, radius: float) -> None:
    """The middle of a daisy or sunflower: a dome of florets in two families of spirals."""
    rho = np.hypot(w.u, w.v) / radius
    shade = 0.62 - 0.20 * (w.u + w.v) / radius - 0.30 * rho * rho
    if w.detail:
        phi, r = np.arctan2(w.v, w.u), np.sqrt(rho)
        shade = shade + w.detail * 0.20 * np.cos(21 * phi + 34 * r) * np.cos(13 * phi - 34 * r) * np.minimum(1, 2 * rho)
    w.paint((rho - 1) * radius, _tone(paint, shade))


def _tilted(w: Window, rng: np.random.Generator) -> Window:
    """The same window for a flower that looks a little aside."""
    squash, angle = rng.uniform(1.0, 1.16), rng.uniform(-0.6, 0.6)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return Window(w.rgb, c * w.u + s * w.v, np.float32(squash) * (c * w.v - s * w.u), w.pixel)


def _daisy(w: Window, colour: str, rng: np.random.Generator) -> None:
    w = _tilted(w, rng)
    n = int(rng.integers(10, 13))
    _petal_ring(w, PAINT[colour], rng, n, 0.16, 0.12, _oval, 0.26)
    _petal_ring(w, PAINT[colour], rng, n, 0.12, 0.15, _oval, 0.62)
    _disc(w, DISC["yellow daisy" if colour == "yellow" else "daisy"], 0.30)


def _sunflower(w: Window, colour: str, rng: np.random.Generator) -> None:
    w = _tilted(w, rng)
    n = int(rng.integers(15, 19))
    _petal_ring(w, PAINT[colour], rng, n, 0.22, 0.17, _lance, 0.42)
    _petal_ring(w, PAINT[colour], rng, n, 0.20, 0.16, _lance, 0.64)
    w.paint(np.hypot(w.u, w.v) - 0.53, DISC["sunflower"][0], 0.4, soft=0.14)
    _disc(w, DISC["sunflower"], 0.47)


def _rose(w: Window, colour: str, rng: np.random.Generator) -> None:
    paint = PAINT[colour]
    turn = rng.uniform(0, 2 * np.pi)
    for k, (radius, petals) in enumerate(((0.98, 5), (0.78, 5), (0.58, 4), (0.39, 3), (0.20, 2))):
        # Inner petals stand higher, so their circle moves up and the bloom becomes a bowl.
        x, y = w.u, w.v + 0.05 * k
        rho, phi = np.hypot(x, y), np.arctan2(y, x)
        turn += 2.4 + rng.uniform(-0.3, 0.3)
        fold = (phi + turn) * (petals / (2 * np.pi))
        fold = fold - np.floor(fold)
        # A petal swells quickly and tapers slowly into the next one, which gives the rose its whorl.
        bulge = np.sqrt(np.clip(fold * (1 - fold) * 4, 0, 1)) * (1.1 - 0.35 * fold)
        rim = radius * (0.84 + 0.17 * bulge)
        depth = (rim - rho) / radius  # 0 at the rim
        shade = 0.70 - 1.25 * depth - 0.16 * (1 - bulge) + 0.30 * np.clip(1 - depth * 9, 0, 1) - 0.07 * (x + y)
        if k:  # the shadow of this ring on the one outside it
            w.paint(rho - rim - 0.06, paint[0], 0.55, soft=0.14)
        w.paint(rho - rim, _tone(paint, shade + 0.02 * k))


def _tulip(w: Window, colour: str, rng: np.random.Generator) -> None:
    paint = PAINT[colour]
    lean = rng.uniform(-0.10, 0.10)
    up, side = 0.92 - w.v, w.u - lean * w.v
    opening = rng.uniform(0.85, 1.1)

    def petal(offset: float, length: float, width: float, tone: float) -> None:
        t = np.clip(up / length, 0, 1)
        across = side - offset * opening * (0.55 * 4 * t * (1 - t) + 0.75 * t * t)
        distance, t = _blade(up, across, length, width, _drop)
        edge = np.clip(1 + distance / 0.22, 0, 1)
        shade = tone - 0.25 + 0.40 * t - 0.25 * edge * edge - 0.22 * across
        if w.detail:
            shade = shade + w.detail * 0.04 * np.cos(across * 40)
        w.paint(distance, _tone(paint, shade))

    for offset, length, width, tone in (
        (0.28, 1.72, 0.44, 0.22),
        (-0.28, 1.72, 0.44, 0.26),
        (0.62, 1.80, 0.42, 0.46),
        (-0.62, 1.80, 0.42, 0.54),
        (0.0, 1.58, 0.50, 0.66),
    ):
        petal(offset, length, width, tone)


BLOOM = {"daisy": _daisy, "rose": _rose, "sunflower": _sunflower, "tulip": _tulip}
# Length and width of a leaf in radii of the bloom, where it leaves the stem (0 at the bloom, 1 at the ground), its
# angle above the horizon, its outline.
LEAVES: dict[str, tuple[float, float, float, float, Outline]] = {
    "daisy": (0.75, 0.10, 0.62, 0.7, _oval),
    "rose": (0.80, 0.24, 0.50, 0.45, _drop),
    "sunflower": (0.85, 0.28, 0.60, 0.35, _drop),
    "tulip": (2.00, 0.22, 1.00, 1.15, _lance),
}


def _stem(canvas: Array, species: str, x: float, y: float, r: float, rng: np.random.Generator) -> None:
    """A stem from the bloom to the ground, and two leaves."""
    bend, ground = rng.uniform(-0.10, 0.10), 1.04
    reach = abs(bend) + 0.1
    w = _window(canvas, x, y, 1.0, (x - reach, y, x + reach, 1.0))
    s = w.v / (ground - y)
    off = w.u - bend * s * s
    thick = 0.012 + 0.035 * r
    w.paint(np.abs(off) - thick, _tone(GREEN, 0.45 - 0.3 * off / thick))
    length, width, where, rise, outline = LEAVES[species]
    for hand in (-1, 1):
        down = where * rng.uniform(0.85, 1.0)
        foot_x, foot_y = x + bend * down * down, y + down * (ground - y)
        angle = rise + rng.uniform(-0.15, 0.15)
        c, d = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        w = _around(canvas, foot_x, foot_y, r, length + 0.1)
        along, across = hand * c * w.u - d * w.v, hand * d * w.u + c * w.v
        across = across - 0.10 * along * along / length
        distance, t = _blade(along, across, length * rng.uniform(0.85, 1.1), width, outline)
        vein = np.clip(1 - np.abs(across) / 0.03, 0, 1) * w.detail
        w.paint(distance, _tone(GREEN, 0.30 + 0.30 * t - 0.6 * across + 0.2 * vein + 0.05 * hand))


# Places of the blooms for one, two and three flowers, and their radius.
PLACES: tuple[tuple[float, tuple[tuple[float, float], ...]], ...] = (
    (0.315, ((0.5, 0.40),)),
    (0.215, ((0.27, 0.40), (0.73, 0.40))),
    (0.190, ((0.5, 0.25), (0.245, 0.60), (0.755, 0.60))),
)


def _background(canvas: Array, rng: np.random.Generator) -> None:
    """Sky and meadow out of focus: a gradient, spots of light and blades of grass."""
    n = canvas.shape[-1]
    top, middle, bottom = SCENES[rng.integers(len(SCENES))] * rng.uniform(0.9, 1.08)
    y = (np.arange(n, dtype=np.float32) + 0.5) / n
    horizon = rng.uniform(0.45, 0.65)
    canvas[:] = np.stack(
        [np.interp(y, (0, horizon, 1), levels) for levels in np.stack([top, middle, bottom], 1)]
    ).astype(np.float32)[:, :, None]
    for _ in range(int(rng.integers(5, 9))):
        x, y0, r = rng.uniform(0, 1), rng.uniform(0, 0.9), rng.uniform(0.04, 0.12)
        w = _around(canvas, x, y0, r, 1.5)
        glow = np.minimum(w.rgb.mean((1, 2)) * 1.5 + 0.1, 1)
        w.paint(np.hypot(w.u, w.v) - 1, glow, rng.uniform(0.10, 0.28), soft=0.35)
    for _ in range(int(rng.integers(6, 10))):
        x, tall = rng.uniform(-0.05, 1.05), rng.uniform(0.12, 0.32)
        lean, tone = rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.45)
        w = _window(canvas, x, 1.03, tall, (x - 0.12, 1.03 - tall, x + 0.12, 1.0))
        up = -w.v
        distance, t = _blade(up, w.u - lean * up * up, 1.0, 0.07, lambda t: 1 - t * t)
        w.paint(distance, _tone(GREEN, tone + 0.2 * t), 0.5, soft=0.06)


def draw(seed: int, index: int, size: int) -> tuple[Array, Flowers]:
    """Draws picture `index` of the stream `seed`.

    Meaning, place, light and shape do not depend on `size`: a larger picture shows the same flowers with more detail.

    Args:
        seed: names the stream of pictures.
        index: the picture, 0 or more.
        size: pixels per side; 32 is legible.

    Returns:
        The picture, uint8 (3, size, size), and what it shows.
    """
    rng = _picture_rng(seed, index)
    flowers = _meaning(rng)
    # Edges are smooth by themselves; two samples per pixel and direction smooth what lies inside a shape.
    canvas = np.empty((3, 2 * size, 2 * size), np.float32)
    _background(canvas, rng)
    radius, places = PLACES[flowers.count - 1]
    slope = rng.uniform(-0.25, 0.25)
    spots = []
    for x, y in places:
        x += rng.uniform(-0.022, 0.022)
        y += rng.uniform(-0.022, 0.022) + slope * (x - 0.5)
        spots.append((x, y, radius * rng.uniform(0.92, 1.04)))
    for x, y, r in spots:
        _stem(canvas, flowers.species, x, y, r, rng)
    for x, y, r in spots:
        w = _around(canvas, x + 0.1 * r, y + 0.12 * r, r, 1.5)
        w.paint(np.hypot(w.u, w.v) - 0.85, GREEN[0] * 0.6, 0.45, soft=0.7)  # the shadow that parts bloom and scene
    for x, y, r in spots:
        BLOOM[flowers.species](_around(canvas, x, y, r, 1.2), flowers.colour, rng)
    pixels = canvas.reshape(3, size, 2, size, 2).mean((2, 4))
    return np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8), flowers


# --- captions ---------------------------------------------------------------------------------------------------------

PRAISE = ("beautiful", "pretty", "lovely")
FRAMES = (
    "a photo of {}",
    "a photograph of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a painting of {}",
    "{} in a garden",
    "{} in the garden",
    "{} in a meadow",
    "{} in a field",
    "{} with green leaves",
    "{} in the grass",
    "{} on a green background",
)
SYNONYMS = {"purple": ("violet",)}
PLAIN = 0.3  # share of training captions in the plainest words


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def caption(flowers: Flowers, rng: np.random.Generator, partial: float = 0.0) -> str:
    """One of many ways to say what a picture shows.

    Args:
        flowers: the meaning.
        rng: chooses the words.
        partial: probability that species, colour or count stays unsaid ("two red flowers", "roses").

    Returns:
        Lower-case words, such as "a photo of two white daisies".
    """
    if rng.random() < PLAIN:
        return flowers.caption
    unsaid = _choose(rng, ("species", "colour", "count")) if rng.random() < partial else ""
    many = flowers.count > 1
    kinds = {False: ("flower", "bloom", "blossom"), True: ("flowers", "blooms", "blossoms")}[many]
    species = PLURALS[flowers.species] if many else flowers.species
    words = [_choose(rng, PRAISE)] if rng.random() < 0.1 else []
    if unsaid != "colour":
        words.append(_choose(rng, (*(3 * (flowers.colour,)), *SYNONYMS.get(flowers.colour, ()))))
    if unsaid == "species":
        words.append(_choose(rng, kinds))
    else:
        words.append(species)
        if rng.random() < 0.12:  # "a red rose flower", "two red rose flowers"
            words[-1:] = [flowers.species, _choose(rng, kinds)]
    first = article(words[0])
    number = {
        1: (first, first, "one", "one single", "a single", "1", "just one", "the"),
        2: ("two", "two", "two", "2", "a pair of", "a couple of", "the two", "just two"),
        3: ("three", "three", "three", "3", "a group of three", "a bunch of three", "the three", "just three"),
    }[flowers.count]
    if unsaid != "count":
        words.insert(0, _choose(rng, number))
    elif many and rng.random() < 0.5:
        words.insert(0, "some")
    text = " ".join(words)
    if rng.random() < 0.05:
        text = f"there are {text}" if many else f"this is {text}"
    elif rng.random() < 0.5:
        text = _choose(rng, FRAMES).format(text)
    return text + "." if rng.random() < 0.1 else text


# --- the data module --------------------------------------------------------------------------------------------------

VAL_START = 1_000_000  # index of the first validation picture, so the size of one split never moves the other
_PROBES = 24


class DrawnFlowers(ImageDataModule):
    """Drawn flowers as a data set: classes are species, captions say species, colour and count.

    Training picture i is index i of the stream `drawing_seed`, validation picture i is index 1,000,000 + i. Training
    captions vary their words; validation captions are the plainest. The original of a row is the row itself.

    Args:
        size: pixels per side.
        n_train: training pictures, 1,000,000 at most.
        n_val: validation pictures.
        drawing_seed: of the pictures and captions; order and augmentation have their own seed.
        partial: share of the training captions that may leave species, colour or count unsaid.
        batch_size: see `ImageDataModule`, as everything below.
        seed: of order and augmentation.
        val_batch_size: by default `batch_size`.
        drop_last: leave out the last, smaller training batch.
        num_workers: loader processes.
        augment: for training pictures.
        exclude: a table of pictures to leave out.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        n_train: int = 4096,
        n_val: int = 256,
        drawing_seed: int = 0,
        partial: float = 0.0,
        batch_size: int,
        seed: int,
        val_batch_size: int | None = None,
        drop_last: bool = True,
        num_workers: int = 0,
        augment: Augment | None = None,
        exclude: str | None = None,
    ) -> None:
        if not 1 <= n_train <= VAL_START or n_val < 1:
            raise AntherError(
                f"data.n_train={n_train} must lie in 1..{VAL_START} and data.n_val={n_val} must be at least 1."
            )
        if not 0 <= partial <= 1:
            raise AntherError(f"data.partial={partial} must lie in 0..1.")
        super().__init__(
            name="drawn flowers",
            image_shape=(3, size, size),
            batch_size=batch_size,
            seed=seed,
            val_batch_size=val_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            augment=augment,
            exclude=exclude,
        )
        self.n_train, self.n_val, self.drawing_seed, self.partial = n_train, n_val, drawing_seed, partial

    def load(self) -> ImageTable:
        """Draws the pictures, or reads them from the cache."""
        seed, size = self.drawing_seed, self.image_shape[1]
        indices = [*range(self.n_train), *range(VAL_START, VAL_START + self.n_val)]
        meanings = [meaning(seed, i) for i in indices]
        captions = [
            caption(m, _caption_rng(seed, i), self.partial) if i < VAL_START else m.caption
            for i, m in zip(indices, meanings, strict=True)
        ]
        # The pictures follow from parameters and code; the probes stand for the code.
        probes = [draw(seed, i, 32)[0] for i in range(_PROBES)]
        digest = content_digest(["drawn flowers", seed, size, self.n_train, self.n_val, captions], probes)
        images, _ = cached_images(
            digest, len(indices), self.image_shape, lambda row: draw(seed, indices[row], size)[0], "drawing flowers"
        )
        return ImageTable(
            images=images,
            labels=torch.tensor([SPECIES.index(m.species) for m in meanings]),
            class_names=SPECIES,
            names=(*(f"train/{i:06d}" for i in range(self.n_train)), *(f"val/{i:06d}" for i in range(self.n_val))),
            captions=tuple(captions),
            digest=digest,
        )

    def make_splits(self, table: ImageTable) -> dict[str, Array]:
        """Training rows come first, validation rows after them."""
        return {"train": np.arange(self.n_train), "val": np.arange(self.n_train, self.n_train + self.n_val)}
