"""The FiftyOne dataset of a run, in a real MongoDB."""

import json
import re
import shutil

import numpy as np
import pytest

from diffusion.curation import brain, dataset, records
from diffusion.curation.dataset import DEFINITIONS, SCORES, VIEWS, build_dataset, name_for, own_name
from diffusion.curation.gather import find_runs, gather, main
from diffusion.errors import AntherError


def embeddings_of(folder):
    rows = np.load(folder / "embeddings.npy")
    return rows.reshape(len(rows), -1)


def test_fields_are_those_of_the_records(fiftyone, built):
    dataset, frame = fiftyone.load_dataset("built"), records.read(built)
    assert dataset.persistent
    assert dataset.values("filepath") == [str(built / file) for file in frame["file"]]
    assert dataset.values("prompt.label") == list(frame["prompt"])
    assert dataset.values("label.label") == list(frame["label"])
    assert dataset.values("sample_index") == list(range(24))
    assert dataset.values("tags") == [["w=3.0"]] * 24
    assert dataset.values("realism")[2] is None
    kept = ("seed", "guidance_weight", "sampler", "steps", "checkpoint", "nearest_real", "nearest_row", "clip_score")
    for name in (*kept, "nearest_distance", "inception_entropy", "uniqueness", "representativeness_closeness"):
        assert dataset.values(name) == frame[name].tolist(), name
    for name in ("rejection_type", "is_idk", "classifier_confidence", "runner_up", "margin"):
        assert dataset.values(name) == frame[name].tolist(), name
    assert dataset.values("pseudo_label.label") == list(frame["pseudo_label"])
    assert dataset.values("final_label.label") == list(frame["final_label"])
    assert dataset.values("final_label.confidence") == frame["classifier_confidence"].tolist()
    assert not dataset.has_field("file")


def test_each_sample_has_its_own_embedding(fiftyone, built):
    dataset = fiftyone.load_dataset("built")
    assert dataset.get_field("unet_embedding").__class__.__name__ == "VectorField"
    by_file = {
        record.file: row for record, row in zip(records.read(built).itertuples(), embeddings_of(built), strict=True)
    }
    for sample in dataset:
        np.testing.assert_array_equal(sample["unet_embedding"], by_file[f"images/{sample.filename}"])
        assert sample["unet_embedding"].dtype == np.float32


def test_scores_are_brains_on_our_embeddings_and_go_into_the_records(fiftyone, built):
    dataset, frame, embeddings = fiftyone.load_dataset("built"), records.read(built), embeddings_of(built)
    expected = brain.scores(embeddings)
    assert set(expected) == set(SCORES)
    for name, column in expected.items():
        np.testing.assert_allclose(np.array(dataset.values(name), float), column, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(frame[name].astype(float), column, atol=1e-6, err_msg=name)
    # A cluster of one has no value: NaN would break JSON and MongoDB's order.
    undefined = int(np.isnan(expected["representativeness"]).sum())
    assert undefined > 0
    assert dataset.values("representativeness").count(None) == undefined
    assert f"representativeness of {undefined} of 24 images" in " ".join(dataset.info["left_out"])
    assert dataset.get_brain_info("uniqueness").config.embeddings_field == "unet_embedding"


def test_visualisations_are_of_our_embeddings(fiftyone, built):
    dataset, embeddings = fiftyone.load_dataset("built"), embeddings_of(built)
    assert {"umap", "pca"} <= set(dataset.list_brain_runs())
    points = dataset.load_brain_results("pca")
    assert list(points.sample_ids) == dataset.values("id")
    centred = embeddings - embeddings.mean(0)
    left, scales, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points.points), np.abs(left[:, :2] * scales[:2]), atol=1e-4)
    assert points.reducer_blob is None
    assert dataset.load_brain_results("umap").points.shape == (24, 2)


def test_saved_views_are_in_order(fiftyone, built):
    dataset, frame = fiftyone.load_dataset("built"), records.read(built)
    assert dataset.list_saved_views() == list(dict.fromkeys(name for name, _, _ in VIEWS))
    for name, field, descending in VIEWS:
        if field != "realism":
            expected = frame.sort_values(field, ascending=not descending)["file"][:6]
            got = dataset.load_saved_view(name).values("filepath")
            assert got == [str(built / file) for file in expected], name


def test_info_holds_run_metrics_and_definitions(fiftyone, built):
    dataset = fiftyone.load_dataset("built")
    dataset.reload()
    facts = json.loads((built / "metrics.json").read_text())
    assert dataset.info["run"] == facts["run"]
    assert dataset.info["metrics"] == facts["metrics"]
    assert set(dataset.info["definitions"]) == set(DEFINITIONS) - {"run", "original", "psnr", "ssim"}  # a run that drew
    assert "FARTHEST" in dataset.get_field("representativeness").description


def test_rebuilding_replaces_the_whole(fiftyone, make_run, tmp_path):
    folder = make_run(tmp_path / "first", n=5)
    build_dataset(folder, "again")
    first = fiftyone.load_dataset("again")
    first.save_view("mine", first.limit(1))
    build_dataset(make_run(tmp_path / "second", n=6, shape=None, scored=False), "again")
    second = fiftyone.load_dataset("again")
    assert len(second) == 6
    assert second.list_saved_views() == second.list_brain_runs() == []
    assert not second.has_field("clip_score")
    assert not second.has_field("unet_embedding")
    fiftyone.delete_dataset("again")


def test_the_name_of_another_folders_dataset_is_not_taken(fiftyone, make_run, tmp_path):
    first, second = make_run(tmp_path / "first" / "run", n=3, shape=None), make_run(tmp_path / "run", n=3, shape=None)
    assert own_name("mine", first) == "mine"
    build_dataset(first, "mine")
    assert own_name("mine", first) == "mine"
    assert re.fullmatch(r"mine [0-9a-f]{6}", own_name("mine", second))
    fiftyone.delete_dataset("mine")


def test_a_name_that_is_asked_for_replaces_nobodys_dataset(fiftyone, make_run, tmp_path):
    first, second = make_run(tmp_path / "first", n=3, shape=None), make_run(tmp_path / "second", n=3, shape=None)
    assert name_for(first, "mine") == "mine"
    build_dataset(first, "mine")
    assert name_for(first, "mine") == "mine"
    gather([first, second], "both")
    fiftyone.Dataset("empty", persistent=True)
    for folder, asked, theirs in ((second, "mine", "mine"), (first, "both", "both"), (first, "Empty", "empty")):
        with pytest.raises(AntherError, match=f"dataset.name={asked} would replace .* delete {theirs}`"):
            name_for(folder, asked)
    with pytest.raises(AntherError, match="choose another name"):
        name_for(first, "маки")
    for name in ("mine", "both", "empty"):
        fiftyone.delete_dataset(name)


def test_a_folder_whose_name_is_none_for_fiftyone_or_is_anothers_there_has_a_dataset(fiftyone, make_run, tmp_path):
    built = []
    for name in ("flowers_small-x", "flowers-small-x", "маки"):
        run = make_run(tmp_path / name, n=2, shape=None)
        built.append(build_dataset(run, own_name(name, run)))
        assert own_name(name, run) == own_name(built[-1], run) == built[-1]
    assert built[0] == "flowers_small-x"
    for name, start in zip(built[1:], ("flowers-small-x", "маки"), strict=True):
        assert re.fullmatch(rf"{start} [0-9a-f]{{6}}", name)
    for name in built:
        fiftyone.delete_dataset(name)


def test_a_build_that_fails_leaves_the_dataset_as_it_was(fiftyone, make_run, tmp_path, monkeypatch):
    import fiftyone.brain as fob

    folder = make_run(tmp_path / "run", n=5)
    build_dataset(folder, "stays")
    before, names = fiftyone.load_dataset("stays").values("id"), fiftyone.list_datasets()

    def stop(*args, **kwargs):
        assert "stays" in fiftyone.list_datasets(), "the old one must live until the new one is whole"
        raise KeyboardInterrupt

    monkeypatch.setattr(fob, "compute_visualization", stop)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(folder, "stays")
    assert fiftyone.load_dataset("stays").values("id") == before
    assert fiftyone.list_datasets() == names
    fiftyone.delete_dataset("stays")


def test_two_builds_of_one_process_number_do_not_meet(fiftyone, make_run, tmp_path, monkeypatch):
    first, second = (make_run(tmp_path / name, n=2, shape=None) for name in ("first", "second"))
    with monkeypatch.context() as patch:

        def meanwhile(made):
            patch.undo()
            build_dataset(second, "of the second")

        patch.setattr(dataset, "_save_views", meanwhile)
        build_dataset(first, "of the first")
    for name in ("of the first", "of the second"):
        assert len(fiftyone.load_dataset(name)) == 2
        fiftyone.delete_dataset(name)


@pytest.mark.parametrize(("n", "fields", "runs"), [(1, 2, ["uniqueness"]), (4, 1, ["pca", "uniqueness"])])
def test_few_images(fiftyone, make_run, tmp_path, n, fields, runs):
    build_dataset(make_run(tmp_path / "run", n=n), "few")
    dataset = fiftyone.load_dataset("few")
    assert dataset.list_brain_runs() == runs
    left_out = " ".join(dataset.info["left_out"])
    assert "umap: it needs more than 15 images" in left_out
    assert "representativeness: Brain needs 20" in left_out
    assert dataset.count("representativeness_closeness") == n
    # Of four images Brain's uniqueness is not a number.
    assert dataset.count("uniqueness") == (0 if n == 4 else n)
    assert ("uniqueness of 4 of 4" in left_out) == (n == 4)
    assert ("uniqueness" in records.read(tmp_path / "run")) == (n != 4)
    fiftyone.delete_dataset("few")


def test_unconditional_run_without_embeddings(fiftyone, make_run, tmp_path):
    folder = make_run(tmp_path / "run", n=4, weight=None, shape=None, prompted=False)
    build_dataset(folder, "bare")
    dataset = fiftyone.load_dataset("bare")
    assert not dataset.has_field("prompt")
    assert dataset.values("tags") == [[]] * 4
    assert dataset.info["left_out"] == [
        "unet_embedding, uniqueness, representativeness, representativeness_closeness, umap, pca: "
        "the run has no embeddings.npy"
    ]
    assert not set(SCORES) & set(records.read(folder))
    fiftyone.delete_dataset("bare")


def test_best_goes_by_realism_where_there_is_no_clip_score(fiftyone, make_run, tmp_path):
    folder = make_run(tmp_path / "run", n=8, shape=None)
    frame = records.read(folder).drop(columns="clip_score")
    records.write(folder, frame)
    build_dataset(folder, "by realism")
    dataset = fiftyone.load_dataset("by realism")
    for name, ascending in (("best", False), ("worst", True)):
        # The image without a value is neither best nor worst.
        expected = frame.sort_values("realism", ascending=ascending)["file"][:2]
        assert dataset.load_saved_view(name).values("filepath") == [str(folder / file) for file in expected]
    fiftyone.delete_dataset("by realism")


def test_flat_embeddings_of_the_course_model(fiftyone, make_run, tmp_path):
    build_dataset(make_run(tmp_path / "run", n=3, shape=(512, 8, 8)), "wide")
    assert fiftyone.load_dataset("wide").first()["unet_embedding"].shape == (32768,)
    fiftyone.delete_dataset("wide")


def test_gathers_a_sweep(fiftyone, make_run, tmp_path, capsys):
    folders = [make_run(tmp_path / "sweep" / f"w={w}.0", n=5, seed=w, weight=float(w)) for w in (0, 1)]
    main([*map(str, folders), "--name", "sweep"])
    assert "python -m diffusion.curation.app 'sweep'" in capsys.readouterr().out
    dataset = fiftyone.load_dataset("sweep")
    assert dataset.values("run") == ["w=0.0"] * 5 + ["w=1.0"] * 5
    assert dataset.values("tags") == [["w=0.0"]] * 5 + [["w=1.0"]] * 5
    assert dataset.values("sample_index") == [*range(5), *range(5)]
    embeddings = np.concatenate([embeddings_of(folder) for folder in folders])
    np.testing.assert_allclose(dataset.values("uniqueness"), brain.uniqueness(embeddings), atol=1e-6)
    np.testing.assert_array_equal(np.stack(dataset.values("unet_embedding")), embeddings)
    assert [run["name"] for run in dataset.info["runs"]] == ["w=0.0", "w=1.0"]
    assert [run["run"]["guidance_weight"] for run in dataset.info["runs"]] == [0, 1]
    assert "uniqueness" not in records.read(folders[0])
    fiftyone.delete_dataset("sweep")


@pytest.fixture
def sweep(make_run, tmp_path):
    """The folder of a sweep of eleven jobs as evaluate.py leaves it, the fourth of which failed."""
    folder = tmp_path / "runs" / "sweep"
    for k in range(11):
        if k != 3:
            make_run(folder / str(k), n=1, seed=k, weight=float(k), shape=None, scored=False)
        (folder / str(k) / ".hydra").mkdir(parents=True)
    for name in ("multirun.yaml", "sweep.csv", "sweep.png"):
        (folder / name).touch()
    return folder


def test_a_sweeps_folder_stands_for_its_runs_in_the_order_of_their_numbers(sweep, capsys):
    finished = [sweep / str(k) for k in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)]
    assert find_runs([sweep]) == finished
    assert capsys.readouterr().out == f"left out: {sweep / '3'} has no records.parquet.\n"
    assert find_runs([sweep / "10", str(sweep / "sweep.csv"), sweep / "2"]) == [sweep / "10", sweep / "2"]
    assert capsys.readouterr().out == ""


def test_the_command_takes_a_sweeps_folder_and_all_that_is_in_it(fiftyone, sweep):
    main([str(sweep), "--name", "by folder"])
    shutil.rmtree(sweep / "3")
    main([*map(str, sorted(sweep.iterdir())), "--name", "by glob"])
    expected = {str(float(k)) for k in range(11) if k != 3}
    for name in ("by folder", "by glob"):
        dataset = fiftyone.load_dataset(name)
        assert {str(weight) for weight in dataset.values("guidance_weight")} == expected
        fiftyone.delete_dataset(name)


def test_what_is_neither_a_run_nor_a_sweep_is_said_in_one_sentence(sweep):
    for paths, message in (
        ([sweep / "0", sweep / "3"], f"{sweep / '3'} is no folder of a run of evaluate.py"),
        ([sweep / "nowhere"], f"{sweep / 'nowhere'} is no folder of a run"),
        ([sweep / "sweep.csv", sweep / "sweep.png"], "gather was given files alone"),
    ):
        with pytest.raises(AntherError) as error:
            main([*map(str, paths), "--name", "none"])
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    with pytest.raises(AntherError, match="once"):
        main([str(sweep), str(sweep / "0"), "--name", "none"])


def test_the_help_of_gather_is_for_people(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "Several runs, such as those of a sweep, as one FiftyOne dataset." in said
    assert "Raises:" not in said


def test_gathering_replaces_nobodys_dataset(fiftyone, make_run, tmp_path, monkeypatch):
    first, second, other = (make_run(tmp_path / name, n=2, shape=None) for name in ("first", "second", "other"))
    labelled = fiftyone.Dataset("precious", persistent=True)
    labelled.add_sample(fiftyone.Sample(filepath=str(tmp_path / "a.png"), mine=fiftyone.Classification(label="rose")))
    gather([first, second, other], "three")
    ids = {name: fiftyone.load_dataset(name).values("id") for name in ("precious", "three")}
    with monkeypatch.context() as patch:
        patch.setattr("diffusion.curation.gather.assemble", lambda *_: pytest.fail("it works before it looks"))
        for asked, theirs in (("precious", "precious"), ("Precious", "precious"), ("three", "three")):
            with pytest.raises(AntherError, match=rf"^--name {asked} would replace .* these folders' .* {theirs}`\.$"):
                main([str(first), str(second), "--name", asked])
    assert {name: fiftyone.load_dataset(name).values("id") for name in ids} == ids
    assert fiftyone.load_dataset("precious").values("mine.label") == ["rose"]
    build_dataset(first, "two")
    gather([first, second], "two")
    gather([second, first], "two")
    assert fiftyone.load_dataset("two").values("run") == ["second"] * 2 + ["first"] * 2
    for name in (*ids, "two"):
        fiftyone.delete_dataset(name)


def test_a_database_that_ends_while_runs_are_gathered_is_one_sentence(fiftyone, make_run, tmp_path, monkeypatch):
    from pymongo.errors import ServerSelectionTimeoutError

    def ended(*_):
        raise ServerSelectionTimeoutError("mongodb://me:secret@host")

    monkeypatch.setattr("diffusion.curation.gather.assemble", ended)
    with pytest.raises(AntherError, match="ended while it was used"):
        gather([make_run(tmp_path / "run", n=1, shape=None)], "none")


def test_gathers_runs_whose_embeddings_differ(fiftyone, make_run, tmp_path):
    folders = [make_run(tmp_path / str(d), n=2, shape=(d,)) for d in (3, 4)]
    gather(folders, "mixed")
    dataset = fiftyone.load_dataset("mixed")
    assert not dataset.has_field("unet_embedding")
    assert "not of one length" in dataset.info["left_out"][0]
    with pytest.raises(AntherError, match="once"):
        gather([folders[0], folders[0]], "mixed")
    fiftyone.delete_dataset("mixed")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "records.parquet").unlink(), "no records"),
        (lambda folder: (folder / "images" / "000001.png").unlink(), "lacks 1 images"),
        (lambda folder: np.save(folder / "embeddings.npy", np.zeros((3, 2), np.float32)), "3 rows for 4 records"),
        (lambda folder: np.save(folder / "embeddings.npy", np.full((4, 2), np.nan, np.float32)), "must be finite"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "metrics.json is damaged"),
    ],
)
def test_refuses_a_folder_that_does_not_fit(fiftyone, make_run, tmp_path, break_it, message):
    folder = make_run(tmp_path / "run", n=4)
    break_it(folder)
    names = fiftyone.list_datasets()
    with pytest.raises(AntherError, match=message):
        build_dataset(folder, "broken")
    assert fiftyone.list_datasets() == names


def test_refuses_a_name_that_fiftyone_does_not_take(fiftyone, make_run, tmp_path, built):
    folder = make_run(tmp_path / "run", n=2)
    for name in ("%", "BUILT"):
        with pytest.raises(AntherError, match="choose another name"):
            build_dataset(folder, name)
    assert len(fiftyone.load_dataset("built")) == 24
    shutil.rmtree(folder)
