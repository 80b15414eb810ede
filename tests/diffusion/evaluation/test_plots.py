import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffusion.evaluation import plots
from diffusion.evaluation.plots import by_prompt, draw_plots, main_score, ranked
from diffusion.evaluation.report import write_metrics
from diffusion.images import from_uint8
from tests.diffusion.evaluation.fake_run import CLIP, PROMPTS, RUN, flat, make_run, results


@pytest.fixture
def no_umap(monkeypatch):
    """UMAP compiles for half a minute; one slow test has it."""
    monkeypatch.setattr(plots, "_embeddings", lambda *args, **options: {})


def real(row):
    """A training image of one colour, which no generated one has."""
    return torch.full((3, 8, 8), 0.0) + from_uint8(torch.tensor([255, row, 128.0]))[:, None, None]


def lines_of(path, colours):
    """What a sheet shows: for each line of pictures the keys of their colours from left to right."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    known = {tuple(int(v) for v in colour): key for key, colour in colours.items()}
    codes = pixels @ np.array([65536, 256, 1])
    wanted = {r * 65536 + g * 256 + b: key for (r, g, b), key in known.items()}
    lines = []
    for row in codes:
        line = tuple(dict.fromkeys(wanted[code] for code in row.tolist() if code in wanted))
        if line and (not lines or lines[-1] != line):
            lines.append(line)
    return lines


def generated(n):
    return {k: flat(k)[0, 0] for k in range(n)}


@pytest.mark.usefixtures("no_umap")
def test_sheets_show_the_right_images_in_the_right_order(tmp_path):
    frame = make_run(tmp_path)
    drawn = draw_plots(tmp_path, real)
    assert [path.stem for path in drawn] == ["grid", "histograms", "prompts", "best", "worst", "nearest"]
    by_score = sorted(range(30), key=lambda k: frame["clip_score"][k])
    count = 15
    assert sum(lines_of(tmp_path / "plots/best.png", generated(30)), ()) == tuple(by_score[::-1][:count])
    assert sum(lines_of(tmp_path / "plots/worst.png", generated(30)), ()) == tuple(by_score[:count])
    assert lines_of(tmp_path / "plots/grid.png", generated(30)) == [tuple(range(k, 24, 3)) for k in range(3)]
    closest = sorted(range(30), key=lambda k: frame["nearest_distance"][k])[:24]
    colours = generated(30) | {("real", row): (255, row, 128) for row in range(30)}
    expected = []
    for k in range(0, 24, 8):
        expected += [tuple(closest[k : k + 8]), tuple(("real", frame["nearest_row"][i]) for i in closest[k : k + 8])]
    assert lines_of(tmp_path / "plots/nearest.png", colours) == expected


def test_prompts_and_scores_stand_beside_their_images(tmp_path):
    frame = make_run(tmp_path)
    texts = {text.get_text(): text.get_position() for text in plots._grid(tmp_path, frame).axes[0].texts}
    assert sorted(PROMPTS, key=lambda prompt: texts[prompt][1]) == list(PROMPTS)
    best, _ = plots._ends(tmp_path, frame, {"clip_score": ""})
    captions = [text.get_text().replace("\n", " ") for text in best.axes[0].texts[2:]]
    rows = ranked(frame, "clip_score").head(15).itertuples()
    assert captions == [f"{row.clip_score:.3f} {row.prompt}" for row in rows]


def test_a_pair_says_whose_numbers_it_has(tmp_path):
    def captions(figure):
        return [text.get_text() for text in figure.axes[0].texts[2:]]

    frame = make_run(tmp_path, n=4, psnr=21.34, ssim=0.6)
    nearest = plots._nearest(tmp_path, frame, {"nearest_distance": "L2"}, real)
    rows = frame.sort_values("nearest_distance").itertuples()
    assert captions(nearest) == [
        f"distance {row.nearest_distance:.2f}\nof image {row.id}\nto {row.nearest_real}" for row in rows
    ]
    pairs = plots._reconstructions(tmp_path, frame, real)
    assert captions(pairs) == [f"PSNR 21.3 dB\nSSIM 0.60\nimage {k:06d}" for k in range(4)]


@pytest.mark.parametrize("scorer", [CLIP, "anther-flowers-32/embedded"])
def test_what_stands_below_the_bars_is_within_the_picture(tmp_path, scorer):
    prompts = ("a prompt of very many words that goes on and on and on", *PROMPTS[1:])
    frame = make_run(tmp_path, n=9, prompts=prompts)
    figure = plots._prompts(frame, {"clip_score": f"cosine of image and prompt by {scorer}"})
    plots.save(figure, tmp_path / "prompts.png")
    box = figure.axes[0].xaxis.label.get_window_extent()
    assert box.x0 > 0
    assert box.x1 < figure.bbox.width


def test_means_and_deviations_are_those_of_each_prompt():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"prompt": [*"abcab", None, "d"], "clip_score": rng.normal(size=7)})
    frame.loc[6, "clip_score"] = np.nan
    got = by_prompt(frame, "clip_score")
    assert list(got.index) == ["a", "b", "c"]
    for prompt, row in got.iterrows():
        values = [v for v, p in zip(frame["clip_score"], frame["prompt"], strict=True) if p == prompt]
        assert row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["std"] == pytest.approx(statistics.pstdev(values))
        assert row["count"] == len(values)


def test_bars_stand_beside_their_prompts(tmp_path):
    frame = make_run(tmp_path, n=9, clip_score=[0.1, 0.5, 0.3] * 3)
    axes = plots._prompts(frame, {"clip_score": "cosine"}).axes[0]
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    widths = [patch.get_width() for patch in axes.patches]
    assert dict(zip(labels, widths, strict=True)) == pytest.approx(dict(zip(PROMPTS, [0.1, 0.5, 0.3], strict=True)))
    assert axes.yaxis_inverted()
    assert labels[0] == PROMPTS[1]


def test_the_order_is_that_of_the_score():
    frame = pd.DataFrame({"realism": [0.3, np.nan, 0.9, 0.9], "id": [*"abcd"]})
    assert list(ranked(frame, "realism")["id"]) == ["c", "d", "a"]
    assert main_score(frame) == "realism"
    assert main_score(frame.assign(clip_score=0.1)) == "clip_score"
    assert main_score(frame.assign(realism=np.nan)) is None


@pytest.mark.usefixtures("no_umap")
@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_images_and_awkward_prompts(tmp_path, n):
    make_run(tmp_path, n, prompts=["costs $5 or $x^{$", "<script>|" + 60 * "long ", "\n"], realism=[np.nan] * n)
    drawn = {path.stem for path in draw_plots(tmp_path, real)}
    assert {"grid", "histograms", "prompts", "best", "worst", "nearest"} == drawn
    for name in drawn:
        assert min(Image.open(tmp_path / "plots" / f"{name}.png").size) > 100
    assert not list((tmp_path / "plots").glob(".*"))


@pytest.mark.usefixtures("no_umap")
def test_what_is_absent_is_left_out_and_so_is_its_old_picture(tmp_path):
    make_run(tmp_path)
    draw_plots(tmp_path, real)
    nothing = dict.fromkeys(
        (
            "clip_score",
            "nearest_distance",
            "nearest_row",
            "uniqueness",
            "representativeness",
            "representativeness_closeness",
        )
    )
    make_run(tmp_path, prompts=None, **nothing)
    assert [path.stem for path in draw_plots(tmp_path, real)] == ["grid"]
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"grid"}
    assert lines_of(tmp_path / "plots/grid.png", generated(30)) == [
        tuple(range(k, min(k + 8, 30))) for k in (0, 8, 16, 24)
    ]


def test_words_come_from_the_record(tmp_path):
    frame = make_run(tmp_path)
    write_metrics(tmp_path, RUN, results(frame))
    units = plots._units(tmp_path)
    assert CLIP in units["clip_score"]
    assert units["nearest_distance"] == "L2 of pixels in [0, 1]"
    labels = [axes.get_xlabel() for axes in plots._histograms(frame, units).axes]
    assert units["clip_score"] in labels
    assert units["nearest_distance"] in labels


def test_large_pictures_are_made_smaller_and_grey_ones_stay_grey(tmp_path):
    make_run(tmp_path, 4, picture=lambda k: np.full((300, 300), 40 * k, np.uint8))
    frame = pd.read_parquet(tmp_path / "records.parquet")
    plots.save(plots._grid(tmp_path, frame), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width < 1000
    greys = {k: (40 * k,) * 3 for k in range(1, 4)}
    assert sum(lines_of(tmp_path / "grid.png", greys), ()) != ()


def places_of(axes):
    return np.concatenate([dots.get_offsets() for dots in axes.collections])


def test_few_embeddings_are_shown_by_their_principal_components(tmp_path):
    frame = make_run(tmp_path, 9)
    units = plots._units(tmp_path)
    embeddings = np.load(tmp_path / "embeddings.npy").astype(float)
    centred = embeddings - embeddings.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = np.abs(u[:, :2] * s[:2])  # the sign of a component is free
    drawn = plots._embeddings(tmp_path, frame, units)
    axes = drawn["embedding_prompt"].axes[0]
    assert "PCA" in axes.get_title()
    assert "too few" in axes.get_title()
    assert [dots.get_label() for dots in axes.collections] == list(PROMPTS)
    for k, dots in enumerate(axes.collections):
        np.testing.assert_allclose(np.abs(dots.get_offsets()), expected[k::3], rtol=1e-4, atol=1e-5)
    axes = drawn["embedding_score"].axes[0]
    np.testing.assert_allclose(np.abs(places_of(axes)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(axes.collections[0].get_array(), frame["clip_score"])


def test_of_many_embeddings_a_choice_is_shown_with_its_own_words(tmp_path, monkeypatch):
    frame = make_run(tmp_path, 30)
    monkeypatch.setattr(plots, "EMBEDDED", 12)
    chosen = np.sort(np.random.default_rng(0).permutation(30)[:12])
    drawn = plots._embeddings(tmp_path, frame, plots._units(tmp_path))
    axes = drawn["embedding_score"].axes[0]
    assert "12 of 30 images" in axes.get_title()
    np.testing.assert_array_equal(axes.collections[0].get_array(), frame["clip_score"].iloc[chosen])
    embeddings = np.load(tmp_path / "embeddings.npy").astype(float)[chosen]
    u, s, _ = np.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(places_of(axes)), np.abs(u[:, :2] * s[:2]), rtol=1e-4, atol=1e-5)


def test_without_embeddings_or_with_too_few_there_is_no_picture_of_them(tmp_path):
    units = {"clip_score": ""}
    frame = make_run(tmp_path, 2)
    assert plots._embeddings(tmp_path, frame, units) == {"embedding_prompt": None, "embedding_score": None}
    frame = make_run(tmp_path, 9)
    (tmp_path / "embeddings.npy").unlink()
    assert plots._embeddings(tmp_path, frame, units) == {"embedding_prompt": None, "embedding_score": None}


@pytest.mark.slow
def test_umap_is_seeded_and_keeps_neighbours_together(tmp_path):
    groups = np.arange(40) % 2
    frame = make_run(tmp_path, 40, prompts=PROMPTS[:2])
    rng = np.random.default_rng(0)
    np.save(
        tmp_path / "embeddings.npy", (rng.normal(size=(40, 4, 2, 2)) + 20 * groups[:, None, None, None]).astype("f4")
    )
    units = plots._units(tmp_path)
    first, second = (plots._embeddings(tmp_path, frame, units)["embedding_prompt"].axes[0] for _ in range(2))
    assert "UMAP" in first.get_title()
    np.testing.assert_array_equal(places_of(first), places_of(second))
    one, other = (dots.get_offsets() for dots in first.collections)
    gap = np.linalg.norm(one.mean(0) - other.mean(0))
    assert gap > 2 * max(one.std(), other.std())
