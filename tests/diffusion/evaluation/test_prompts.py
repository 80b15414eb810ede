"""Prompts from wherever they come, and the classes that they name."""

from pathlib import Path

import pytest
import yaml

import diffusion
from datamodules.folders import FolderImages
from diffusion.errors import AntherError
from diffusion.evaluation.prompts import labels_of, read_prompts

CLASSES = ["daisy", "roses", "sunflowers"]
CONF = Path(diffusion.__file__).parents[1] / "conf"


def test_a_list_is_taken_as_it_is_and_none_stays_none():
    assert read_prompts(["b", "a", "b"], CLASSES) == ["b", "a", "b"]
    assert read_prompts(None, CLASSES) is None


def test_a_text_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff# ours\n a red rose \r\n\n  \n\t# not this\nzwei weiße Gänseblümchen # 2\n".encode())
    assert read_prompts(str(path), CLASSES) == ["a red rose", "zwei weiße Gänseblümchen # 2"]


@pytest.mark.parametrize("content", [["a rose", "3"], {"prompts": ["a rose", "3"]}])
@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_yaml_file_is_a_list_alone_or_under_prompts(content, suffix, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    path.write_text(yaml.safe_dump(content))
    assert read_prompts(str(path), CLASSES) == ["a rose", "3"]


def test_the_word_classes_is_the_class_list_with_captions_where_given():
    assert read_prompts("classes", CLASSES) == CLASSES
    assert read_prompts("classes", CLASSES, {"roses": "A photo of a rose"}) == [
        "daisy",
        "A photo of a rose",
        "sunflowers",
    ]
    with pytest.raises(AntherError, match="name none"):
        read_prompts("classes", [])


def test_shipped_lists():
    assert read_prompts("three", CLASSES) == [
        "A photo of a red rose",
        "A photo of a white daisy",
        "A photo of a yellow sunflower",
    ]
    many = read_prompts("seed001", CLASSES)
    assert many is not None
    assert len(set(many)) == len(many) == 23
    assert {"A detailed rose flower", "Two white daisies with yellow centers", "Two daisies"} <= set(many)
    # Every prompt names one class of the cropped flowers, so each image of seed 001's kind has a label.
    assert set(labels_of(many, CLASSES)) == set(CLASSES)


def test_no_folder_of_prompt_files_is_taken_for_a_group_of_hydra():
    # A folder conf/prompts would make `prompts=[...]` on the command line a choice of group.
    assert not (CONF / "prompts").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "empty list"),
        (["a rose", 3], "3, which is no text"),
        (["a rose", " "], "' ', which is no text"),
        ("tree", r"no shipped list \(.*seed001, three\).*prompts='\[tree\]'"),
        ("a red rose", r"prompts='\[a red rose\]'"),
        ("nowhere/mine.txt", r"cannot read the prompts in nowhere/mine.txt.*\(.*seed001, three\)"),
        ("folder.txt", "cannot read"),
        ("blank.txt", "blank.txt is an empty list"),
        ("number.yaml", "number.yaml holds no list"),
        ("text.yaml", "text.yaml holds no list"),
        ("other.yaml", "other.yaml holds no list"),
        ("numbers.yaml", "numbers.yaml holds 3, which is no text"),
        ("broken.yaml", "broken.yaml cannot be read as UTF-8 yaml"),
        ("binary.txt", "binary.txt cannot be read as UTF-8 txt"),
    ],
)
def test_what_is_no_prompt_is_refused(given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.txt").mkdir()
    Path("blank.txt").write_text("# nothing\n\n")
    Path("number.yaml").write_text("3")
    Path("text.yaml").write_text("a rose")
    Path("other.yaml").write_text("texts: [a rose]")
    Path("numbers.yaml").write_text("[a rose, 3]")
    Path("broken.yaml").write_text("prompts: [a rose")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00rose")
    with pytest.raises(AntherError, match=says):
        read_prompts(given, CLASSES)


def test_labels_are_whole_words_in_singular_or_plural_and_one_class_alone():
    prompts = ["A photo of a red rose", "two white Daisies", "rosewood", "a rose and a daisy", "flowers", "SUNFLOWER."]
    assert labels_of(prompts, CLASSES) == ["roses", "daisy", None, None, None, "sunflowers"]
    assert labels_of(["a desert rose", "a rose"], ["rose", "desert-rose"]) == ["desert-rose", "rose"]


def test_a_caption_names_its_class_whatever_its_words_are():
    data = FolderImages(path="x", batch_size=1, seed=0, size=8, nouns={"shasta_daisy": "white daisy"})
    classes = ["rose", "shasta_daisy"]
    captions = {name: data.caption(name) for name in classes}
    prompts = read_prompts("classes", classes, captions)
    assert prompts == ["A photo of a rose", "A photo of a white daisy"]
    assert labels_of(prompts, classes) == ["rose", None]
    assert labels_of(prompts, classes, captions) == classes
