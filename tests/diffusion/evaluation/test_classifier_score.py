from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datamodules.folders import FolderImages
from diffusion.errors import AntherError
from diffusion.evaluation import scoring
from diffusion.evaluation.classifier import export_classifier
from diffusion.evaluation.classifier_score import ClassifierScore
from diffusion.evaluation.reals import Reals
from diffusion.networks.classifier import LeNet, infer

RUN = {"steps": 7, "guidance_weight": None}


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network() -> LeNet:
    torch.manual_seed(0)
    network = LeNet(11)
    nn.init.normal_(network.fc2.weight, std=3.0)  # sure of something
    return network.eval()


@pytest.fixture
def weights(network, tmp_path):
    path = tmp_path / "classifier.safetensors"
    export_classifier(network, {"temperature": 2.0, "threshold": 0.4}, path)
    return str(path)


def split(images: torch.Tensor) -> Reals:
    rows = np.arange(len(images))
    return Reals(images, rows, tuple(f"{row}.png" for row in rows), "test", "digest")


def scorer(weights, threshold=None, reals=None):
    return ClassifierScore(weights, threshold, split(pixels(300, 1) if reals is None else reals), "cpu")


def test_the_jobs_of_a_sweep_share_the_features_of_the_reals(weights, monkeypatch):
    class Data:
        table = SimpleNamespace(digest="digest")

    monkeypatch.setattr(scoring, "read_reals", lambda *_: split(pixels(20, 1)))
    node = {"weights": weights, "threshold": None, "split": "test"}
    config = {"clip": None, "inception": None, "nearest": None, "classifier": node}
    data, subject = Data(), SimpleNamespace(other_splits=lambda datamodule: [])
    first, second = (scoring.Scorers(config, subject, data, "cpu") for _ in range(2))
    assert first._classifier is second._classifier


def test_the_identity_and_every_protocol_know_which_reals_were_left_out(weights, tmp_path):
    """Two lists of equal length leave the digest of the data and the number of the reals as they are."""
    for k in range(12):
        path = tmp_path / "digits" / str(k % 2) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, k)[0, 0].numpy()).save(path)
    found = []
    for left_out in ("0/0.png", "1/1.png"):
        (tmp_path / "exclude.csv").write_text(f"name,reason\n{left_out},doubtful\n")
        small = {"size": 28, "channels": 1, "batch_size": 2, "seed": 0, "split": {"train": 0.5, "val": 0.5}}
        data = FolderImages(path=str(tmp_path / "digits"), exclude=str(tmp_path / "exclude.csv"), **small)
        data.setup()
        found.append(scoring.load_classifier_scorer(weights, None, "all", data, "cpu"))
    one, other = (scorer.identity for scorer in found)
    assert {key for key in one if one[key] != other[key]} == {"reals"}
    for scorer in found:
        for result in scorer.score(pixels(20), ["0"] * 20, RUN)[1].values():
            assert result.protocol["reals"] == scorer.identity["reals"]


def test_columns_are_what_the_network_says_of_each_image(network, weights):
    images = pixels(200)
    columns, results = scorer(weights).score(images, [None] * 200, RUN)
    logits, _ = infer(network, images.float() / 127.5 - 1)
    probability = (logits.double() / 2).softmax(1)
    kinds = {"none": 0, "soft": 0, "hard": 0}
    for k in range(200):
        raw, sure = int(probability[k].argmax()), float(probability[k].max())
        kind = "hard" if raw == 10 else "soft" if sure < 0.4 else "none"
        kinds[kind] += 1
        order = probability[k, :10].argsort(descending=True).tolist()
        digits = probability[k, :10] / probability[k, :10].sum()
        assert columns["rejection_type"][k] == kind
        assert columns["pseudo_label"][k] == str(order[0])
        assert columns["runner_up"][k] == str(order[1])
        assert columns["final_label"][k] == (str(raw) if kind == "none" else "IDK")
        assert columns["is_idk"][k] is (kind != "none")
        assert columns["classifier_confidence"][k] == pytest.approx(sure, abs=1e-5)
        assert columns["margin"][k] == pytest.approx(float(digits[order[0]] - digits[order[1]]), abs=1e-5)
    assert min(kinds.values()) > 0, "every kind must be there"
    declined = results["classifier_declined_200"]
    assert declined.value == pytest.approx((kinds["soft"] + kinds["hard"]) / 200)
    assert declined.note.startswith(f"{kinds['hard']} hard, {kinds['soft']} soft; ")
    assert results["classifier_confidence_200"].value == pytest.approx(float(probability.max(1).values.mean()))
    counts = {k: results[f"digit_{k}_200"].value for k in range(10)}
    assert counts == {k: columns["final_label"].count(str(k)) for k in range(10)}
    assert "classifier_accuracy_200" not in results
    for result in results.values():
        assert RUN.items() <= result.protocol.items()
        assert (result.protocol["N"], result.protocol["threshold"], result.protocol["split"]) == (200, 0.4, "test")


def test_agreement_is_over_what_was_accepted_and_asked_for(weights):
    images = pixels(100)
    columns, _ = scorer(weights).score(images, [None] * 100, RUN)
    accepted = [k for k in range(100) if columns["final_label"][k] != "IDK"]
    # The first accepted one gets a wrong label, one gets none, all others what the classifier says.
    labels = list(columns["final_label"])
    labels[accepted[0]] = "none of them"
    labels[accepted[1]] = None
    result = scorer(weights).score(images, labels, RUN)[1]["classifier_accuracy_100"]
    assert result.value == pytest.approx(1 - 1 / (len(accepted) - 1))
    assert f"{len(accepted) - 1} accepted" in result.note


def test_distances_are_those_of_torch_fidelity_in_the_networks_features(network, weights):
    from scipy.linalg import sqrtm

    images, reals = pixels(250), pixels(300, 1)
    _, results = scorer(weights, reals=reals).score(images, [None] * 250, RUN)
    ours, theirs = (infer(network, part.float() / 127.5 - 1)[1].double().numpy() for part in (images, reals))
    root = sqrtm(np.cov(ours.T) @ np.cov(theirs.T)).real
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    expected = apart + np.trace(np.cov(ours.T) + np.cov(theirs.T) - 2 * root)
    assert results["classifier_fd_250"].value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert "not an FID" in results["classifier_fd_250"].note
    assert {"classifier_kd_250", "classifier_kd_std_250"} <= set(results)
    own = scorer(weights, reals=images).score(images, [None] * 250, RUN)[1]
    assert own["classifier_fd_250"].value == pytest.approx(0, abs=1e-3)


def test_a_threshold_of_ones_own(weights):
    images = pixels(50)
    for threshold in (0.0, 1.0):
        found = scorer(weights, threshold)
        columns, _ = found.score(images, [None] * 50, RUN)
        assert found.identity["threshold"] == threshold
        assert columns["rejection_type"].count("soft") == (
            0 if threshold == 0 else 50 - columns["rejection_type"].count("hard")
        )


def test_one_image_has_no_distance(weights):
    _, results = scorer(weights).score(pixels(1), [None], RUN)
    assert results["classifier_fd_1"].value is None
    assert results["classifier_fd_1"].note


def test_what_is_refused(weights, network, tmp_path):
    with pytest.raises(AntherError, match=r"takes images \(1, 28, 28\) and these are \(3, 32, 32\)"):
        scorer(weights, reals=torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(AntherError, match=r"takes images .* set classifier=null"):
        scorer(weights).score(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), [None] * 4, RUN)
    with pytest.raises(AntherError, match=r"classifier\.threshold=1\.5"):
        scorer(weights, 1.5)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(AntherError, match=r"has no threshold: set classifier\.threshold"):
        scorer(str(tmp_path / "theirs.pth"))
    assert scorer(str(tmp_path / "theirs.pth"), 0.5).identity["temperature"] == 1.0
