from types import SimpleNamespace

import pytest

from diffusion.evaluation.run import _data_name


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ({"_target_": "datamodules.drawn.DrawnFlowers"}, "embedded"),
        ({"_target_": "datamodules.mnist.MNIST", "path": "x"}, "mnist"),
        ({"_target_": "datamodules.mnist_idk.MNISTWithIDK"}, "mnist_idk"),
        ({"_target_": "datamodules.flowers102.Flowers102", "name": "flowers102_seed004"}, "flowers102_seed004"),
        ({"_target_": "datamodules.folders.FolderImages", "name": None}, "FolderImages"),
        ({"_target_": "somebody.Elses"}, "Elses"),
        ({}, None),
    ],
)
def test_data_go_by_the_name_that_people_give_them(node, name):
    assert _data_name(SimpleNamespace(config={"data": node})) == name
