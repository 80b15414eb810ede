"""What tests of image files share."""

import pytest


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in the place of the session's."""
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
