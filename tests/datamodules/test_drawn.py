import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import drawn
from datamodules.drawn import COLOURS, COUNTS, PAINT, PLURALS, SPECIES, DrawnFlowers, Flowers, caption, draw, meaning
from diffusion.errors import AntherError

SOLID = ("rose", "tulip")  # blooms of one piece and one colour


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path))


def data(**settings) -> DrawnFlowers:
    made = DrawnFlowers(**{"n_train": 24, "n_val": 8, "batch_size": 8, "seed": 0, **settings})
    made.setup()
    return made


def painted(picture: np.ndarray) -> np.ndarray:
    """Which colour of PAINT each pixel is nearest to in its body tone, -1 where none is near: (H, W)."""
    pixels = picture.astype(np.float32).transpose(1, 2, 0)[:, :, None] / 255
    distance = np.linalg.norm(pixels - np.stack([tones[1] for tones in PAINT.values()]), axis=-1)
    return np.where(distance.min(-1) < 0.22, distance.argmin(-1), -1)


def read(text: str) -> tuple[str | None, str | None, int | None]:
    """Species, colour and count that a caption says, by rules of its own."""
    words = re.findall(r"[a-z0-9]+", text)
    words = ["purple" if word == "violet" else word for word in words if word not in ("background", "leaves")]
    species = [s for s in SPECIES if s in words or PLURALS[s] in words]
    colours = [c for c in PAINT if c in words]
    numbers = {"two": 2, "2": 2, "pair": 2, "couple": 2, "three": 3, "3": 3}
    counts = {numbers[word] for word in words if word in numbers}
    if (
        not counts
        and {*SPECIES, "flower", "bloom", "blossom"} & {*words}
        and not {"flowers", "blooms", "blossoms"} & {*words}
    ):
        counts = {1}
    assert len(species) <= 1, text
    assert len(colours) <= 1, text
    assert len(counts) <= 1, text
    return (species or [None])[0], (colours or [None])[0], (list(counts) or [None])[0]


def test_a_picture_is_a_function_of_seed_index_and_size():
    first = [draw(3, i, 32)[0] for i in range(6)]
    np.random.seed(1)  # the global state must not matter
    assert all(np.array_equal(draw(3, i, 32)[0], first[i]) for i in reversed(range(6)))
    assert not any(np.array_equal(first[i], first[k]) for i in range(6) for k in range(i))
    assert not np.array_equal(draw(4, 0, 32)[0], first[0])
    assert first[0].shape == (3, 32, 32)
    assert first[0].dtype == np.uint8


@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_every_size_shows_the_same_flowers(size):
    for i in range(12):
        picture, flowers = draw(0, i, size)
        assert flowers == meaning(0, i)
        side = np.gcd(size, 32)
        small, reference = (
            p.reshape(3, side, p.shape[1] // side, side, -1).mean((2, 4)) for p in (picture, draw(0, i, 32)[0])
        )
        assert np.abs(small - reference).mean() < 5


def test_meanings_are_uniform_over_species_their_colours_and_counts():
    found = [meaning(0, i) for i in range(4000)]
    for species in SPECIES:
        of_species = [f for f in found if f.species == species]
        assert abs(len(of_species) - 1000) < 120
        for colour in COLOURS[species]:
            share = sum(f.colour == colour for f in of_species) / len(of_species)
            assert abs(share * len(COLOURS[species]) - 1) < 0.35
    for count in (1, 2, 3):
        assert abs(sum(f.count == count for f in found) - 1333) < 130
    assert {*found} == {*drawn.everything()}


def test_the_colour_of_the_caption_covers_most_of_the_blooms():
    hits = []
    for i in range(250):
        picture, flowers = draw(5, i, 32)
        counts = np.bincount(painted(picture).ravel() + 1, minlength=len(PAINT) + 1)[1:]
        hits.append(list(PAINT)[counts.argmax()] == flowers.colour)
    assert np.mean(hits) > 0.97


def test_as_many_blooms_as_the_caption_counts():
    from scipy.ndimage import binary_closing, binary_opening, label

    hits = []
    for i in range(400):
        flowers = meaning(5, i)
        if flowers.species not in SOLID:
            continue
        picture, _ = draw(5, i, 96)
        mask = painted(picture) == list(PAINT).index(flowers.colour)
        pieces, _ = label(binary_opening(binary_closing(mask, iterations=2), iterations=4))
        hits.append(sum(np.bincount(pieces.ravel())[1:] > 60) == flowers.count)
    assert len(hits) > 150
    assert np.mean(hits) > 0.9


def test_plainest_captions():
    assert Flowers("tulip", "orange", 1).caption == "an orange tulip"
    assert Flowers("rose", "red", 1).caption == "a red rose"
    assert Flowers("daisy", "white", 2).caption == "two white daisies"
    assert Flowers("sunflower", "yellow", 3).caption == "three yellow sunflowers"


def test_captions_say_what_is_drawn():
    rng = np.random.default_rng(0)
    flowers = [meaning(0, i) for i in range(1500)]
    texts = [caption(f, rng) for f in flowers]
    assert len({*texts}) > 700
    for f, text in zip(flowers, texts, strict=True):
        assert read(text) == (f.species, f.colour, f.count), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert text == text.lower().strip()


def test_partial_captions_leave_one_thing_unsaid_and_say_nothing_wrong():
    rng = np.random.default_rng(0)
    unsaid = {0: 0, 1: 0, 2: 0}
    for i in range(1500):
        f = meaning(0, i)
        said = read(text := caption(f, rng, partial=1.0))
        for k, (value, truth) in enumerate(zip(said, (f.species, f.colour, f.count), strict=True)):
            assert value in (truth, None), text
            unsaid[k] += value is None
    assert min(unsaid.values()) > 150


def test_batches_splits_and_labels():
    made = data()
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    assert made.image_shape == (3, 32, 32)
    assert made.class_names == SPECIES
    assert {*made.splits["train"]}.isdisjoint(made.splits["val"])
    assert {k: len(rows) for k, rows in made.splits.items()} == {"train": 24, "val": 8}
    for row in range(24):
        species, _, _ = read(made.table.captions[row])
        assert SPECIES[made.table.labels[row]] == species
        assert np.array_equal(made.table.images[row], draw(0, row, 32)[0])
    assert "24 train, 8 val" in made.describe()


def test_validation_is_the_same_for_any_number_of_training_pictures_and_shares_none():
    small, large = data(), data(n_train=40)
    rows = large.splits["val"]
    assert np.array_equal(small.table.images[small.splits["val"]], large.table.images[rows])
    assert [large.table.captions[row] for row in rows] == [meaning(0, 1_000_000 + i).caption for i in range(8)]
    train = {large.table.images[row].tobytes() for row in large.splits["train"]}
    assert not any(large.table.images[row].tobytes() in train for row in rows)


def test_other_words_never_change_a_picture():
    plain, partial = data(), data(partial=1.0)
    assert plain.table.captions != partial.table.captions
    assert np.array_equal(plain.table.images, partial.table.images)


def test_the_digest_follows_everything_that_a_table_holds(monkeypatch):
    tables = [data(), data(), data(partial=1.0), data(drawing_seed=1), data(size=16), data(n_val=9), data(seed=1)]
    digests = [made.table.digest for made in tables]
    assert digests[0] == digests[1] == digests[6]
    assert len({*digests}) == 5
    monkeypatch.setitem(drawn.BLOOM, "rose", drawn.BLOOM["tulip"])  # the code changes
    assert data().table.digest != digests[0]


@pytest.mark.parametrize(
    "settings",
    [{"n_train": 0}, {"n_train": 1_000_001}, {"n_val": 0}, {"partial": 1.5}, {"size": 0}, {"batch_size": 25}],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(AntherError, match=next(iter(settings))):
        data(**settings).train_dataloader()


def test_counts_have_words():
    assert len(COUNTS) == len(drawn.PLACES) == 3


def test_yaml_builds_it():
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(drawn.__file__).parents[1] / "conf"), version_base="1.3"):
        conf = compose("train", ["experiment=demo"])
    made = instantiate(conf.data, n_train=4, n_val=2, batch_size=2)
    made.setup()
    assert isinstance(made, DrawnFlowers)
    assert torch.equal(made.table.labels, data(n_train=4, n_val=2, batch_size=2).table.labels)
