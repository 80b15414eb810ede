"""Exports are read again by FiftyOne and by Hugging Face `datasets`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusion.curation import records
from diffusion.curation.dataset import build_dataset
from diffusion.curation.export import export_fiftyone, export_imagefolder, load_exported
from diffusion.errors import AntherError
from tests.test_hostile_words import PROMPTS as HOSTILE


@pytest.fixture(scope="module")
def moved(fiftyone, built, tmp_path_factory):
    """The export of `built` on what could be another machine: elsewhere, and alone."""
    export = export_fiftyone("built", built)
    assert export == built / "dataset"
    assert sorted(path.name for path in built.iterdir() if path.name.startswith(".")) == []
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "dataset"
    shutil.move(export, elsewhere)
    return elsewhere


def test_reload_gives_the_same(fiftyone, built, moved):
    load_exported(moved, "reloaded")
    before, after = fiftyone.load_dataset("built"), fiftyone.load_dataset("reloaded")
    assert after.persistent
    fields = set(before.get_field_schema()) - {"created_at", "last_modified_at", "filepath", "metadata"}
    assert set(after.get_field_schema()) >= fields
    for name in sorted(fields - {"unet_embedding", "prompt", "label"}):
        assert after.values(name) == before.values(name), name
    for name in ("prompt.label", "label.label"):
        assert after.values(name) == before.values(name), name
    np.testing.assert_array_equal(np.stack(after.values("unet_embedding")), np.stack(before.values("unet_embedding")))
    assert after.first()["unet_embedding"].dtype == np.float32
    for old, new in zip(before.values("filepath"), after.values("filepath"), strict=True):
        assert new.startswith(str(moved / "data"))
        np.testing.assert_array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(old)))
    assert after.info == before.info
    assert after.list_saved_views() == before.list_saved_views()
    assert after.load_saved_view("best").values("id") == before.load_saved_view("best").values("id")
    assert after.list_brain_runs() == before.list_brain_runs()
    for key in ("umap", "pca"):
        old, new = before.load_brain_results(key), after.load_brain_results(key)
        np.testing.assert_array_equal(new.points, old.points)
        assert list(new.sample_ids) == list(old.sample_ids)
    assert after.get_field("uniqueness").description == before.get_field("uniqueness").description
    fiftyone.delete_dataset("reloaded")


def test_loading_replaces_nobodys_dataset(fiftyone, moved, tmp_path):
    theirs = fiftyone.Dataset("theirs", persistent=True)
    theirs.add_sample(fiftyone.Sample(filepath=str(tmp_path / "a.png"), mine=fiftyone.Classification(label="rose")))
    names = fiftyone.list_datasets()
    for asked in ("theirs", "Theirs"):
        with pytest.raises(AntherError, match=f"loaded as '{asked}', would replace .* data set 'theirs'"):
            load_exported(moved, asked)
    assert fiftyone.list_datasets() == names
    assert fiftyone.load_dataset("theirs").values("mine.label") == ["rose"]
    ids = []
    for _ in range(2):
        load_exported(moved, "ours")
        ids.append(fiftyone.load_dataset("ours")._doc.id)
    assert ids[0] != ids[1]
    for name in ("theirs", "ours"):
        fiftyone.delete_dataset(name)


def test_export_names_no_folder_of_this_machine(built, moved):
    samples = json.loads((moved / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == [f"data/{k:06d}.png" for k in range(24)]
    for path in moved.rglob("*.json"):
        for folder in (built.parents[1], Path.home()):  # of the tests, the cache included, and of the user
            assert str(folder) not in path.read_text(), path


def test_hostile_words_are_words(fiftyone, make_run, tmp_path):
    n = len(HOSTILE)
    folder = make_run(tmp_path / "run", n)
    frame = pd.read_parquet(folder / "records.parquet")
    frame["prompt"], frame["label"] = HOSTILE, HOSTILE[::-1]
    frame["nearest_real"] = [f"{word}/1.jpg" for word in HOSTILE]
    frame.to_parquet(folder / "records.parquet")
    build_dataset(folder, "hostile")
    export_fiftyone("hostile", folder)
    load_exported(folder / "dataset", "hostile again")
    for name in ("hostile", "hostile again"):
        held = fiftyone.load_dataset(name)
        assert held.values("prompt.label") == list(HOSTILE)
        assert held.values("label.label") == list(HOSTILE[::-1])
        assert held.values("nearest_real") == [f"{word}/1.jpg" for word in HOSTILE]
        fiftyone.delete_dataset(name)
    data = {path.name for path in (folder / "dataset" / "data").iterdir()}
    assert data == {f"{k:06d}.png" for k in range(n)}
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_export_is_whole_or_absent(fiftyone, built, tmp_path, monkeypatch):
    export = export_fiftyone("built", tmp_path)
    (export / "mark").touch()
    (tmp_path / ".dataset-killed").mkdir()
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(fiftyone.Dataset, "export", stop)
        with pytest.raises(KeyboardInterrupt):
            export_fiftyone("built", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert (export / "mark").exists()
    export_fiftyone("built", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert not (export / "mark").exists()
    with pytest.raises(AntherError, match="no dataset 'nowhere'"):
        export_fiftyone("nowhere", tmp_path)


def test_refuses_what_is_no_export(fiftyone, tmp_path):
    with pytest.raises(AntherError, match="no FiftyOneDataset"):
        load_exported(tmp_path, "nothing")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "samples.json").write_text("{")
    (tmp_path / "dataset" / "metadata.json").write_text("{}")
    names = fiftyone.list_datasets()
    with pytest.raises(AntherError, match="is damaged"):
        load_exported(tmp_path, "nothing")
    assert fiftyone.list_datasets() == names


@pytest.fixture
def load_dataset(tmp_path, monkeypatch):
    """Hugging Face's `load_dataset` of an image folder, without its hub."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(folder):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))

    return load


def test_datasets_loads_the_image_folder(built, load_dataset):
    folder = export_imagefolder(built)
    assert folder == built / "imagefolder"
    loaded = load_dataset(folder)
    assert list(loaded) == ["test"]
    frame, embeddings = records.read(built), np.load(built / "embeddings.npy").reshape(24, -1)
    assert set(loaded["test"].column_names) == {"image", "unet_embedding", *frame.columns} - {"file"}
    for row, record, embedding in zip(loaded["test"], frame.to_dict("records"), embeddings, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(Image.open(built / record["file"])))
        np.testing.assert_array_equal(np.asarray(row["unet_embedding"], dtype=np.float32), embedding)
        for key in set(frame.columns) - {"file"}:
            value = record[key]
            assert row[key] == (None if value != value else value), key  # NaN is not itself


def test_image_folder_of_a_bare_run(make_run, load_dataset, tmp_path):
    folder = make_run(tmp_path / "run", n=3, shape=None, scored=False, weight=None, prompted=False)
    (folder / "metrics.json").unlink()
    export_imagefolder(folder)
    export_imagefolder(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["imagefolder", "images", "records.parquet"]
    loaded = load_dataset(folder / "imagefolder")["test"]
    assert set(loaded.column_names) == {"image", "id", "seed", "sampler", "steps", "checkpoint"}
    assert loaded["seed"][:] == [100, 101, 102]
