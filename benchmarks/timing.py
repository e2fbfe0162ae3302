"""What the benchmarks share: a median of repeated runs, the machine they ran on, and the option to keep the text."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mcar_lib.runs.environment import describe_environment


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
    return f"{processor}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}; {versions}."


def report_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also store the printed text here")
    return parser


def print_report(text: str, path: Path | None) -> None:
    """Prints a report; stores it too where --write FILE was given."""
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
