"""Where and when a table was measured: its first line."""

import argparse
import datetime
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

INSTRUCTIONS = {
    "amx_tile": "AMX",
    "avx512_bf16": "bf16 of AVX-512",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimd": "NEON",
}


def device_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--device` to the options of a benchmark that can be run on a GPU."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, choices=sorted({"cpu", there}), help=f"{there}, unless it is given")


def print_where(*libraries: str, device: str = "cpu") -> None:
    """The device, the processor, its instructions, how busy it is, versions and the date.

    Args:
        *libraries: distributions besides torch whose versions matter.
        device: where it is measured.
    """
    if device != "cpu":
        print(f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, in a machine with", end=" ")
    model, has = processor(Path("/proc/cpuinfo"))
    told = ", ".join(name for flag, name in INSTRUCTIONS.items() if flag in has) or platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *libraries))
    busy = f"{os.getloadavg()[0]:.1f} processes busy" if hasattr(os, "getloadavg") else "load unknown"
    print(f"{model}, {told}, {os.cpu_count()} cores, {busy}; {versions}; {datetime.date.today()}", flush=True)


def processor(cpuinfo: Path) -> tuple[str, Iterable[str]]:
    """The name of the first processor that Linux lists and the names of its features."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), ()
    lines = (line.partition(":") for line in cpuinfo.read_text().partition("\n\n")[0].splitlines())
    told = {key.strip(): value.strip() for key, _, value in lines}
    return told.get("model name", platform.machine()), told.get("flags", told.get("Features", "")).split()
