"""What the benchmarks share: repeated runs, the photos, the machine they ran on, and the option to keep the text."""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from reports import Finding

if TYPE_CHECKING:
    from mcar_lib.data import ImageSet

T = TypeVar("T")
DATA_ROOT = "MCAR_DATA"  # of the environment: the folder that holds VOCdevkit/VOC2007


class Skipped(Exception):  # noqa: N818 (nothing went wrong)
    """Why a benchmark cannot be measured here."""


def median_seconds(job: Callable[[], object], runs: int) -> float:
    """Median wall-clock seconds; a first call that is not counted pays for memory and caches."""
    job()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


Seconds = Mapping[str, Sequence[float]]  # arm -> of each round, the same rounds for all arms


def in_turns(arms: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Wall-clock seconds of arms that take turns, A B C A B C, so that drift of the machine meets all alike; a first
    round that is not counted pays for memory and caches."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, job in arms.items():
            start = time.perf_counter()
            job()
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(seconds: Seconds, ours: str, theirs: str) -> float:
    """The median over rounds of our time to theirs in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def beside(seconds: Seconds, each: Mapping[str, float], ours: str, theirs: str, **told: Any) -> Finding:
    """One arm beside another: the figures of both from `each`, the ratio from their rounds. told: what, unit, and the
    other fields of Finding; against is the other arm's name where it is not told."""
    told.setdefault("against", theirs)
    return Finding(ours=each[ours], theirs=each[theirs], ratio=ratio(seconds, ours, theirs), **told)


def each_in_a_process(job: Callable[..., T], arguments: Iterable[Sequence[Any]]) -> list[T]:
    """What job returns for each, one after another, each in a process that has done nothing else but imports."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["mcar_lib.training", "mcar_lib.runs.environment"])
    with ProcessPoolExecutor(1, mp_context=server, max_tasks_per_child=1) as pool:
        return [pool.submit(job, *each).result() for each in arguments]


def photos(count: int, split: str = "train") -> "ImageSet":
    """Real photos, the first of a list of VOC2007 below the data root; raises Skipped where there are none."""
    from mcar_lib.data import load_voc
    from mcar_lib.errors import MCARError

    root = os.environ.get(DATA_ROOT)
    if not root:
        raise Skipped(f"it needs photos: name a folder that holds VOCdevkit/VOC2007 (DATA_ROOT=DIR, or {DATA_ROOT})")
    try:
        found = load_voc(Path(root), "2007", split)
    except MCARError as error:
        raise Skipped(f"no photos: {error}") from error
    return found.select(range(min(count, len(found))))


def machine() -> str:
    """Processor, cores, threads used and versions, in one line."""
    from mcar_lib.runs.environment import describe_environment

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
