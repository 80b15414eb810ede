"""The commands' memory: what one step frees, the next one uses."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
from diffusion.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def step():
    a, b = torch.ones(40_000_000), torch.ones(3_000_000)  # 160 and 12 MB: above and below what glibc keeps by itself
for _ in range(5):  # until the heap has its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_used_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    pages = 10 * 4 * 43_000_000 // 4096
    assert faults["leave"] > pages // 1000  # in pages of 4 kB or of 2 MB
    assert faults["keep"] < faults["leave"] / 10


def test_the_commands_keep_it(monkeypatch, capsys):
    from diffusion import cli

    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    cli.run(lambda: None)
    assert called == [True]
