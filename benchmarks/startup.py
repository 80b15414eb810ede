"""How long a person waits for help and for a composed config, against importing the libraries they do not need.

Whole processes in turns, CPU seconds of each as the operating system counts them; medians.
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.where import print_where

ROUNDS = 5
COMMANDS = {
    "import torch, lightning": ["-c", "import torch, lightning"],
    "train.py --help": ["train.py", "--help"],
    "train.py --cfg job": ["train.py", "experiment=flowers", "--cfg", "job"],
    "sample.py --help": ["sample.py", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[1]
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    print_where("lightning", "hydra-core")
    for arguments in COMMANDS.values():
        cpu_seconds(arguments)  # warms the file cache
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            seconds[name].append(cpu_seconds(arguments))
    base = statistics.median(seconds["import torch, lightning"])
    print(f"{'command':28}{'CPU s':>8}{'ratio':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:28}{median:8.2f}{median / base:8.3f}")


if __name__ == "__main__":
    main()
