import logging

import pytest
import torch

from diffusion.conditioning.cache import cache_path, cached
from diffusion.errors import AntherError

ROWS = torch.arange(12.0).reshape(4, 3)


def never():
    raise AssertionError("computed again")


def test_computed_once_and_read_back(cache_folder):
    assert torch.equal(cached({"a": 1}, (4, 3), lambda: ROWS), ROWS)
    assert torch.equal(cached({"a": 1}, (4, 3), never), ROWS)
    assert [p.suffix for p in (cache_folder / "embeddings").iterdir()] == [".safetensors"]


def test_every_part_of_the_key_counts():
    keys = [{"a": 1, "b": [1, 2]}, {"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1}]
    assert len({cache_path(key) for key in keys}) == len(keys)
    assert cache_path({"a": 1, "b": 2}) == cache_path({"b": 2, "a": 1})


def _truncate(path):
    path.write_bytes(path.read_bytes()[:40])


def _shape(path):
    from safetensors.torch import save_file

    save_file({"embedding": torch.zeros(3, 3)}, path)


def _nan(path):
    from safetensors.torch import save_file

    save_file({"embedding": torch.full((4, 3), torch.nan)}, path)


@pytest.mark.parametrize("damage", [_truncate, _shape, _nan, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_computed_again_with_a_notice(damage, caplog):
    cached({"a": 1}, (4, 3), lambda: ROWS)
    damage(cache_path({"a": 1}))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached({"a": 1}, (4, 3), lambda: ROWS), ROWS)
    assert "computed again" in caplog.text
    assert torch.equal(cached({"a": 1}, (4, 3), never), ROWS)


def test_embeddings_that_are_not_finite_are_not_stored(cache_folder):
    with pytest.raises(AntherError, match="first: row 2"):
        cached({"a": 1}, (4, 3), lambda: torch.where(ROWS == 7, torch.nan, ROWS))
    assert not (cache_folder / "embeddings").exists()
