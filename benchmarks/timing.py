"""What the benchmarks share: a median of repeated runs, the machine they ran on, and the option to keep the text."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mcar_lib.machine import describe_environment


def median_seconds(job: Callable[[], object], runs: int) -> float:
    """Median wall-clock seconds; a first call that is not counted pays for memory and caches."""
    job()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def machine() -> str:
    """Processor, cores, threads used and versions, in one line."""
    processor = describe_environment()["processor"]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used; {versions}."


def print_report(description: str | None, report: Callable[[], str]) -> None:
    """Prints what report returns; with --write FILE also stores it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also store the printed text here")
    arguments = parser.parse_args()
    text = report()
    print(text)
    if arguments.write:
        arguments.write.write_text(text + "\n", encoding="utf-8")
