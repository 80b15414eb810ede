import json

import pytest
import torch

from diffusion.errors import AntherError
from diffusion.evaluation.classifier import SHIPPED, export_classifier, get_classifier, load_classifier
from diffusion.networks.classifier import LeNet


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(n)) * 2 - 1


def same(a: LeNet, b: LeNet) -> bool:
    a.eval(), b.eval()
    with torch.no_grad():
        return torch.equal(a(images()), b(images()))


@pytest.mark.parametrize("classes", [10, 11])
def test_what_is_exported_is_what_is_loaded(classes, tmp_path):
    network, path = LeNet(classes), tmp_path / "classifier.safetensors"
    export_classifier(network, {"temperature": 1.25, "threshold": 0.75, "experiment": "mine"}, path)
    found = load_classifier(path)
    assert (found.temperature, found.threshold, found.facts["experiment"]) == (1.25, 0.75, "mine")
    assert found.network.classes == classes
    assert not found.network.training
    assert same(found.network, network)
    assert same(get_classifier(path), network)
    assert len(found.sha256) == 64


@pytest.mark.parametrize("wrapped", ["plain", "compiled", "nested", "half"])
def test_a_state_dict_with_the_seeds_keys_loads(wrapped, tmp_path):
    network = LeNet(11)
    content = network.state_dict()
    if wrapped == "compiled":
        content = {f"_orig_mod.{key}": value for key, value in content.items()}
    if wrapped == "nested":
        content = {"epoch": 1, "model_state_dict": content}
    if wrapped == "half":
        network = network.bfloat16().float()
        content = {key: value.bfloat16() for key, value in network.state_dict().items()}
    torch.save(content, tmp_path / "best_multiclass.pth")
    found = load_classifier(tmp_path / "best_multiclass.pth")
    assert same(found.network, network)
    assert (found.temperature, found.threshold) == (1.0, None)


class Pickled:
    pass


def test_files_that_hold_no_classifier(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"fc2.weight": torch.zeros(11, 84)}, tmp_path / "part.pth")
    torch.save(Pickled(), tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, says in {
        "cut.safetensors": "not a whole safetensors file",
        "other.pth": "its keys are weight",
        "part.pth": "another network than LeNet.*conv1",
        "code.pth": "not a state dict",
        "list.pth": "its keys are none",
        "nowhere.pth": "there is no classifier .*mnist_idk",
    }.items():
        with pytest.raises(AntherError, match=says):
            load_classifier(tmp_path / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_classifiers_say_what_they_are(name):
    found = load_classifier(name)
    assert found.network.classes == {"mnist_idk": 11, "mnist_classifier": 10}[name]
    assert SHIPPED[name].stat().st_size < 2**20
    assert found.name == found.facts["experiment"] == name
    assert 0.5 < found.temperature < 2
    assert 0 < found.threshold < 1
    assert found.facts["n_test"] == 10_000
    accuracy = found.facts["accuracy"] if name == "mnist_classifier" else found.facts["selective"]["accuracy"]
    assert accuracy >= 0.992
    # Nothing of the machine that trained it.
    assert "/" not in json.dumps(found.facts).replace("n/a", "")


def test_get_classifier_is_ready_to_be_called():
    network = get_classifier()
    assert network(images()).shape == (5, 11)
    assert same(network, load_classifier("mnist_idk").network)
