"""Which size and how many epochs a few photos of one's own are best trained with, at equal cost: what `mcar train
--data` proposes rests on this.

    python benchmarks/own_photos.py --data-root DIR [--processes 7] [--rows FILE.jsonl] [--write FILE.md]

DIR holds VOCdevkit/VOC2007. Of its test photos, of which voc-photos has seen none, two small sets are made: all 20
classes (at most 128 photos to train on) and 4 classes (at most 64), the others to score. Every run of a set looks at
about as many pixels. The rate of the profile own (0.1 x K / 20) stands beside another. Two seeds; the mean of both is
told, mAP of the scored photos after the last epoch. On a GPU it takes three minutes. --rows: a line a run is kept,
and what is there is not run again.
"""

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timing import machine, print_report, report_parser

from mcar_lib.data import load_voc
from mcar_lib.runs import Runs
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.own import check_own, own_config

CLASSES = {"k20": (), "k4": ("bicycle", "car", "chair", "dog")}  # none named: all
MOST = {"k20": 128, "k4": 64}  # photos to train on
RATES = {"k20": (0.1, 0.03), "k4": (0.02, 0.1)}
SIZES = ((96, 30), (128, 17), (160, 11), (224, 6))  # px, epochs
STARTS, SEEDS, LONGEST = ("bundled", "voc-photos"), (0, 1), 330


class Job(NamedTuple):
    """One run."""

    set: str
    start: str
    size: int
    epochs: int
    rate: float
    seed: int


def write_sets(root: Path, folder: Path) -> None:
    """The photos, and a labels.csv for each set."""
    test = load_voc(root, "2007", "test")
    (folder / "photos").mkdir()
    for path in test.paths:
        with Image.open(path) as image:
            image.thumbnail((LONGEST, LONGEST))
            image.convert("RGB").save(folder / "photos" / path.name, quality=88)
    for name, classes in CLASSES.items():
        rows: list[tuple[str, str, str]] = []
        for path, targets in zip(test.paths, test.targets, strict=True):
            shown = [each for each, target in zip(test.classes, targets.tolist(), strict=True) if target == 1]
            if kept := [each for each in shown if not classes or each in classes]:
                trained = len(rows) % 5 < 2 and sum(row[2] == "train" for row in rows) < MOST[name]
                rows.append((f"../photos/{path.name}", ";".join(kept), "train" if trained else "val"))
        (folder / name).mkdir()
        with (folder / name / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "labels", "split"), *rows])


def score(job: Job, folder: Path) -> list[float]:
    """mAP in percent of the global, the local and both streams."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as place:
        runs = Runs("own", f"{place}/results", folder / job.set, f"{place}/artifacts", verbose=False)
        config = own_config(runs.profile.run, check_own(runs, runs.profile.run))
        values = {"weights": job.start, "image_size": job.size, "epochs": job.epochs, "learning_rate": job.rate}
        record = runs.run(config.vary(**values, evaluate_every=job.epochs, seed=job.seed))
    return [100 * record.map(stream) for stream in ("global", "local", "fused")]


def jobs() -> Iterable[Job]:
    return (
        Job(name, start, *size, rate, seed)
        for seed in SEEDS
        for name in CLASSES
        for rate in RATES[name]
        for size in SIZES
        for start in STARTS
    )


def report(found: dict[Job, list[float]]) -> str:
    by_setting: dict[tuple[object, ...], list[list[float]]] = defaultdict(list)
    for job, scores in sorted(found.items()):
        by_setting[job[:-1]].append(scores)
    lines = ["| classes | starts from | px | epochs | rate | mAP global | local | both |", f"|{' --- |' * 8}"]
    for (name, *setting), scores in by_setting.items():
        means = [f"{statistics.mean(each):.1f}" for each in zip(*scores, strict=True)]
        lines.append(f"| {' | '.join([str(name)[1:], *map(str, setting), *means])} |")
    device = describe_environment()["device"]
    lines += ["", f"Means of {len(SEEDS)} seeds; MobileNet-v2, batch 16, N = 4. Device: {device}. {machine()}"]
    return "\n".join(lines)


def main() -> None:
    parser = report_parser(__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("MCAR_DATA"), help="holds VOCdevkit/VOC2007")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side")
    parser.add_argument("--rows", type=Path, help="where a line a run is kept")
    options: argparse.Namespace = parser.parse_args()
    kept = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    found = {Job(*row[:6]): row[6:9] for row in map(json.loads, kept)}
    wanted = [job for job in jobs() if job not in found]
    with tempfile.TemporaryDirectory() as place:
        if wanted:
            write_sets(options.data_root, Path(place))
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            for job, scores in zip(wanted, pool.map(score, wanted, [Path(place)] * len(wanted)), strict=True):
                found[job] = scores
                if options.rows:
                    with options.rows.open("a") as file:
                        file.write(json.dumps([*job, *scores]) + "\n")
    print_report(report(found), options.write)


if __name__ == "__main__":
    main()
