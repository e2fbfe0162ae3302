"""How often intervals and p-values err where the truth is known: one arm held against itself over other seeds.

    python benchmarks/calibration.py --artifacts DIR [--seeds 40] [--draws 4000] [--write FILE.md]

Trains short runs of both models, one a seed, over scenes at 64 px (a small network, so that there can be many), and
keeps them below DIR: stopped, it goes on where it was. Then it draws disjoint groups of three and of five seeds of one
arm, each time with a half of the test images drawn at random, and counts how often three methods call the groups
different at p < 0.05, where 5 % are owed. Draws share seeds and images, so the counts are good to about a point.
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from timing import machine, print_report, report_parser
from torch import nn

from mcar_lib import backbones
from mcar_lib.intervals import resampled_maps, two_level, two_level_difference
from mcar_lib.progress import say
from mcar_lib.runs import BASELINE, METHOD, Profile, Runs
from mcar_lib.weights import Source

CHANNELS = (3, 16, 32, 64, 96, 128)
BACKBONE = "five convolutions"
PROFILE = Profile.model_validate_json("""{
 "name": "calibration", "title": "calibration", "seeds": [0], "bootstrap_resamples": 2000, "threads": 1, "run": {
  "dataset": "scenes", "data_options": {"num_train": 400, "num_test": 600, "side": 64, "seed": 11},
  "weights": "none", "image_size": 64, "num_regions": 2, "epochs": 4, "batch_size": 16, "learning_rate": 0.1,
  "backbone_factor": 1.0, "schedule": "onecycle", "warmup": 0.2, "jitter": 0.0}}""")
SIZES = (3, 5)  # seeds of a group
METHODS = ("images only", "seeds only", "two-level")
HALVES = 20  # drawn of the test images; the other half goes with each
NUM_RESAMPLES = 300
SIGNIFICANT = 0.05
Arm = tuple[np.ndarray, np.ndarray]  # mAP of each seed: of resamples (R, S), of the images as they are (S,)


def five_convolutions() -> nn.Module:
    """(B, 3, H, W) -> (B, 128, H/32, W/32)."""
    layers: list[nn.Module] = []
    for channels, wider in itertools.pairwise(CHANNELS):
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers)


def trained_scores(runs: Runs, num_seeds: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Test scores (S, n, K) of each arm, and the targets (n, K)."""
    config = runs.profile.run.vary(backbone=BACKBONE)
    scores: dict[str, list[torch.Tensor]] = {BASELINE: [], METHOD: []}
    for seed in range(num_seeds):
        for arm in scores:
            scores[arm].append(runs.scores(config.vary(seed=seed, local_stream=arm == METHOD)).fused)
        say(f"seed {seed}: both runs are there")
    return {arm: torch.stack(found) for arm, found in scores.items()}, runs.data(config).test.targets


def p_values(a: Arm, b: Arm) -> dict[str, float]:
    """p of "no difference" between two groups by each of METHODS."""
    differences = a[0].mean(axis=1) - b[0].mean(axis=1)  # percentile bootstrap over images: what was used before
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    return {
        "images only": min(1.0, 2 * (smaller + 1) / (len(differences) + 1)),
        "seeds only": float(stats.ttest_ind(a[1], b[1], equal_var=False).pvalue),  # Welch
        "two-level": two_level_difference(*a, *b).p_value,
    }


def misses(a: Arm, b: Arm) -> bool:
    """Whether the intervals of two means, of other seeds on other images, put together exclude that they are equal."""
    one, other = two_level(*a), two_level(*b)
    parts = [each.seed_error**2 + each.image_error**2 for each in (one, other)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / one.degrees_of_freedom + parts[1] ** 2 / other.degrees_of_freedom)
    return bool(2 * stats.t.sf(abs(one.estimate - other.estimate) / sum(parts) ** 0.5, freedom) < SIGNIFICANT)


def counted(scores: dict[str, torch.Tensor], targets: torch.Tensor, draws: int) -> Counter[tuple[str, int, str]]:
    """How often, of all draws, each method finds a difference: (arm or pair of arms, seeds of a group, method)."""
    generator, found = np.random.default_rng(0), Counter[tuple[str, int, str]]()
    num_seeds = len(scores[METHOD])
    for half in range(HALVES):
        images = generator.permutation(len(targets))
        sides = [images[: len(images) // 2], images[len(images) // 2 :]]
        arms = {
            arm: [resampled_maps(of[:, side], targets[side], NUM_RESAMPLES, half) for side in sides]
            for arm, of in scores.items()
        }
        for size, _ in itertools.product(SIZES, range(draws // HALVES)):
            seeds = generator.permutation(num_seeds)
            first, second = seeds[:size], seeds[size : 2 * size]
            for arm, (here, there) in arms.items():
                for method, p in p_values(_of(here, first), _of(here, second)).items():
                    found[arm, size, method] += p < SIGNIFICANT
                found[arm, size, "mean"] += misses(_of(here, first), _of(there, second))
            for method, p in p_values(_of(arms[METHOD][0], first), _of(arms[BASELINE][0], second)).items():
                found[f"{METHOD} against {BASELINE}", size, method] += p < SIGNIFICANT
    return found


def _of(arm: Arm, seeds: np.ndarray) -> Arm:
    return arm[0][:, seeds], arm[1][seeds]


def report(artifacts: Path, num_seeds: int, draws: int) -> str:
    backbones.BACKBONES[BACKBONE] = backbones.Entry(five_convolutions, CHANNELS[-1], Source(BACKBONE))
    runs = Runs(PROFILE, artifacts / "results", artifacts=artifacts, verbose=False)
    scores, targets = trained_scores(runs, num_seeds)
    found = counted(scores, targets, draws)
    total = draws // HALVES * HALVES
    rows = []
    for what, size in itertools.product((*scores, f"{METHOD} against {BASELINE}"), SIZES):
        shares = [f"{100 * found[what, size, method] / total:.1f}" for method in METHODS]
        held = f"{100 - 100 * found[what, size, 'mean'] / total:.1f}" if what in scores else "-"
        rows.append(f"| {what} | {size} and {size} | {' | '.join(shares)} | {held} |")
    maps = {arm: 100 * resampled_maps(of, targets, 2)[1] for arm, of in scores.items()}
    spread = "; ".join(f"{arm} {each.mean():.1f} (sd over seeds {each.std(ddof=1):.1f})" for arm, each in maps.items())
    return "\n".join(
        [
            "Percent of draws in which two groups of seeds are called different (p < 0.05). An arm against itself owes",
            "5; the two arms against each other show how often the difference there is gets found. Last column: how",
            "often the intervals of two means, of other seeds and other images, agree; 95 is owed.",
            "",
            "| what | seeds | images only | seeds only (Welch) | two-level | mean holds |",
            "|---|---|---:|---:|---:|---:|",
            *rows,
            "",
            f"mAP on all {len(targets)} test images: {spread}; {num_seeds} seeds each.",
            f"{total:,} draws a row, on {HALVES} random halves of the test images, {NUM_RESAMPLES} resamples of each.",
            machine(),
        ]
    )


def parser() -> argparse.ArgumentParser:
    made = report_parser(__doc__)
    made.add_argument("--artifacts", type=Path, required=True, help="where runs and scenes are kept")
    made.add_argument("--seeds", type=int, default=40, help="runs of each arm, at least 10 (40)")
    made.add_argument("--draws", type=int, default=4000, help=f"pairs of groups, at least {HALVES} (4000)")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = parser().parse_args()
    if options.seeds < 2 * max(SIZES) or options.draws < HALVES:
        raise SystemExit(f"--seeds must be at least {2 * max(SIZES)} and --draws {HALVES}")
    print_report(report(options.artifacts, options.seeds, options.draws), options.write)
