"""OpenMP tells itself how its threads wait when it is loaded."""

import os
import subprocess
import sys

import pytest

LOADS_TORCH = "from diffusion import cli; cli.run(lambda: __import__('torch'))"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP elsewhere")
@pytest.mark.parametrize(("chosen", "found"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_the_commands_threads_sleep_unless_told_otherwise(chosen, found):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if chosen is None else {"OMP_WAIT_POLICY": chosen})
    done = subprocess.run([sys.executable, "-c", LOADS_TORCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"OMP_WAIT_POLICY = '{found}'" in done.stderr
