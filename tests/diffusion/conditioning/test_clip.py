import dataclasses
import gc
import weakref

import pytest
import torch

from diffusion.conditioning import clip as clip_module
from diffusion.conditioning.clip import Clip
from diffusion.conditioning.openclip import find_clip
from diffusion.errors import AntherError


@pytest.fixture
def loads(monkeypatch):
    """The CLIPs that were loaded, as weak references."""
    seen = []

    def load(*args):
        model = real(*args)
        seen.append(weakref.ref(model))
        return model

    real = clip_module.load_clip
    monkeypatch.setattr(clip_module, "load_clip", load)
    return seen


def test_images_in_training_and_texts_in_sampling(reference, make_table, monkeypatch):
    path, images, texts = reference
    monkeypatch.setattr(clip_module, "_CHUNK", 4)
    table = make_table(n=9)
    clip = Clip("tiny", str(path), training="image")
    clip.prepare(table)
    index = torch.tensor([8, 0, 3, 3, 5])
    rows = clip.lookup({"index": index, "label": torch.zeros(5, dtype=torch.long)})
    torch.testing.assert_close(rows, images([table.original(int(i)) for i in index]))
    prompts = ["a red rose", "two white daisies", "a red rose"]
    torch.testing.assert_close(clip.encode(prompts), texts(prompts))
    assert clip.encode([]).shape == (0, 12)


def test_captions_in_training(reference, make_table):
    path, _, texts = reference
    table = make_table()
    clip = Clip("tiny", str(path), training="text")
    clip.prepare(table)
    rows = clip.lookup({"index": torch.tensor([1, 2, 5])})
    torch.testing.assert_close(rows, texts([table.captions[1], table.captions[2], table.captions[5]]))
    torch.testing.assert_close(rows[:1], clip.encode([table.captions[1]]))


def test_width_null_and_description_need_no_weights():
    clip = Clip("ViT-B-32", "openai")
    assert (clip.dim, clip.null.shape) == (512, (512,))
    assert "ViT-B-32" in clip.describe()
    assert "image" in clip.describe()


@pytest.mark.parametrize("training", ["image", "text"])
def test_the_second_time_no_clip_is_loaded_and_none_stays(reference, make_table, loads, training):
    path, _, _ = reference
    for _ in range(2):
        clip = Clip("tiny", str(path), training=training)
        clip.prepare(make_table())
        clip.encode(["a rose", "two daisies"])
        clip.encode(["two daisies"])
    assert len(loads) == 2, "one for the table, one for the prompts, none in the second round"
    gc.collect()
    assert all(ref() is None for ref in loads)


def test_other_weights_other_images_and_other_preprocessing_are_embedded_anew(write_clip, make_table, loads):
    index = {"index": torch.arange(6)}

    def rows(path, table):
        clip = Clip("tiny", str(path))
        clip.prepare(table)
        return clip.lookup(index)

    table = make_table(digest="same")
    first, other = write_clip()[0], write_clip(seed=1)[0]
    a, b, c = rows(first, table), rows(other, table), rows(first, make_table(seed=1))
    assert len(loads) == 3
    assert not torch.allclose(a, b)
    assert not torch.allclose(a, c)
    assert torch.equal(rows(first, table), a)
    assert len(loads) == 3


def test_another_preprocessing_of_the_same_weights_is_another_source(reference):
    """Weights of open_clip's tags do not hold their preprocessing, so the weights' hash does not tell it."""
    source = find_clip("tiny", str(reference[0]))
    other = dataclasses.replace(source, preprocess=source.preprocess | {"mean": (0.0, 0.0, 0.0)})
    assert other.weights_hash == source.weights_hash
    assert other.identity != source.identity


def test_unknown_words_stop_before_training(reference, make_table):
    table = dataclasses.replace(make_table(), captions=("a blue tulip",) * 6)
    with pytest.raises(AntherError, match="tulip"):
        Clip("tiny", str(reference[0]), training="text").prepare(table)
    Clip("tiny", str(reference[0]), training="image").prepare(table)


def test_training_is_image_or_text():
    with pytest.raises(AntherError, match="image or text"):
        Clip("ViT-B-32", "openai", training="both")
