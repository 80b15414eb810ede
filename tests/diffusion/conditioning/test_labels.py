import pytest
import torch

from diffusion.conditioning.labels import Labels, find_class
from diffusion.errors import AntherError

FLOWERS = ("daisy", "roses", "sunflowers")


@pytest.mark.parametrize(
    ("prompt", "k"),
    [
        ("a photo of a red rose", 1),
        ("Roses!", 1),
        ("two white daisies", 0),
        ("daisy", 0),
        ("A SUNFLOWER, close up", 2),
        ("2", 2),
        (" 0 ", 0),
        ("a rose beside roses", 1),
    ],
)
def test_prompts_find_their_class(prompt, k):
    assert find_class(prompt, FLOWERS) == k


@pytest.mark.parametrize(
    ("prompt", "names", "k"),
    [
        ("a desert rose", ("rose", "desert-rose"), 1),
        ("a rose", ("rose", "desert-rose"), 0),
        ("purple irises", ("iris", "tulip"), 0),
        ("a bird of paradise in bloom", ("tulip", "bird_of_paradise"), 1),
        ("a handwritten 7", tuple("0123456789"), 7),
        ("1", ("2", "1"), 1),  # a name goes before an index
    ],
)
def test_names_of_several_words_and_numbers(prompt, names, k):
    assert find_class(prompt, names) == k


@pytest.mark.parametrize("prompt", ["a tulip", "", "3", "-1", "a rose and a daisy", "primrose"])
def test_no_class_or_several_is_one_sentence_that_names_the_classes(prompt):
    with pytest.raises(AntherError, match="daisy, roses, sunflowers"):
        find_class(prompt, FLOWERS)


def test_one_hot_in_training_and_sampling():
    labels = Labels(class_names=FLOWERS)
    assert labels.dim == 3
    hot = labels.lookup({"label": torch.tensor([2, 0]), "index": torch.tensor([7, 8])})
    assert torch.equal(hot, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert torch.equal(labels.encode(["a sunflower", "a daisy"]), hot)
    assert labels.encode(["a rose"]).dtype == torch.float32


def test_classes_must_be_those_of_the_data(make_table):
    table = make_table()  # daisy, roses
    Labels(class_names=["daisy", "roses"]).prepare(table)
    Labels(num_classes=2).prepare(table)
    for other in (Labels(class_names=["roses", "daisy"]), Labels(num_classes=3), Labels(class_names=FLOWERS)):
        with pytest.raises(AntherError, match="daisy, roses"):
            other.prepare(table)


@pytest.mark.parametrize("given", [{}, {"class_names": ["a"], "num_classes": 1}])
def test_classes_are_given_in_one_way(given):
    with pytest.raises(AntherError, match="num_classes"):
        Labels(**given)
