"""What tables say, computed once more from the kept scores of trained runs, by a few lines of NumPy, SciPy and
scikit-learn that share nothing with the library."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

from mcar_lib.data.transforms import normalise
from mcar_lib.localisation import ClassRegions, annotated_objects, overlap_measures, pointing_game
from mcar_lib.regions import attention_maps
from mcar_lib.runs import Profile, Record, RunConfig, Runs, compare, differences, interval

CLOSE = 1e-9
RESAMPLES = 20  # of the tiny profile


@pytest.fixture(scope="module")
def runs(tiny_profile: Profile, scenes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("independent")
    shutil.copytree(scenes_data, folder / "data", copy_function=shutil.copy2)
    return Runs(tiny_profile, folder / "results", artifacts=folder, verbose=False)


@pytest.fixture(scope="module")
def arms(runs: Runs, tiny_config: RunConfig) -> dict[str, list[Record]]:
    """Three seeds of each model."""
    return {
        name: [runs.run(tiny_config.vary(seed=seed, local_stream=local)) for seed in range(3)]
        for name, local in (("MCAR", True), ("baseline", False))
    }


def kept(runs: Runs, records: Sequence[Record]) -> np.ndarray:
    """The scores (S, n, K) of the records' runs as they lie on the disk: of both streams the higher one, if there are
    two."""
    found = []
    for record in records:
        with np.load(runs.artifacts / "runs" / record.run_id / "scores.npz") as stored:
            streams = [stored[f"last_{name}"] for name in ("global", "local")]
        found.append(np.maximum(*streams) if record.config.local_stream else streams[0])
    return np.stack(found)


def targets_of(runs: Runs, record: Record) -> np.ndarray:
    return runs.data(record.config).test.targets.numpy()


def ap(scores: np.ndarray, targets: np.ndarray) -> float:
    """Of one class: mean over its positives of the share of positives among all that score as high."""
    scores, targets = scores[targets >= 0], targets[targets >= 0]
    as_high = scores >= scores[targets == 1, None]
    return float(np.mean(as_high[:, targets == 1].sum(axis=1) / as_high.sum(axis=1)))


def mean_ap(scores: np.ndarray, targets: np.ndarray) -> float:
    present = np.flatnonzero((targets == 1).any(axis=0))
    return float(np.mean([ap(scores[:, k], targets[:, k]) for k in present]))


def resampled(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(R, S): the first draws of generator 0 are the resamples."""
    generator, n = np.random.default_rng(0), len(targets)
    draws = [generator.integers(n, size=n) for _ in range(RESAMPLES)]
    return np.array([[mean_ap(seed[drawn], targets[drawn]) for seed in scores] for drawn in draws])


def covariance(a: np.ndarray, b: np.ndarray, same: bool) -> float:
    """Mean over pairs of a seed of a and one of b; of different seeds where both are the same arm."""
    pairs = [(s, t) for s, t in itertools.product(range(a.shape[1]), range(b.shape[1])) if not (same and s == t)]
    return float(np.mean([np.cov(a[:, s], b[:, t])[0, 1] for s, t in pairs]))


def two_levels(centre: float, seed_variances: Sequence[float], image_variance: float) -> list[float]:
    """Low, high, p from the variance over three seeds of each independent group, and that of the images."""
    variance = sum(seed_variances) / 3 + max(0.0, image_variance)
    freedom = variance**2 / sum((each / 3) ** 2 / 2 for each in seed_variances)
    reach = stats.t(freedom).ppf(0.975) * variance**0.5
    return [centre - reach, centre + reach, 2 * stats.t(freedom).sf(abs(centre) / variance**0.5)]


def test_map_is_that_of_scikit_learn_over_labels_that_are_not_difficult(
    runs: Runs, arms: dict[str, list[Record]]
) -> None:
    assert (targets_of(runs, arms["MCAR"][0]) == -1).any()
    for record in itertools.chain(*arms.values()):
        (scores,), targets = kept(runs, [record]), targets_of(runs, record)
        sure = targets >= 0
        aps = [
            average_precision_score(targets[sure[:, k], k], scores[sure[:, k], k])
            for k in np.flatnonzero((targets == 1).any(axis=0))
        ]
        assert record.map() == pytest.approx(np.mean(aps), abs=CLOSE)
        assert mean_ap(scores, targets) == pytest.approx(np.mean(aps), abs=CLOSE)


def test_intervals_and_p_values_hold_seeds_and_images(runs: Runs, arms: dict[str, list[Record]]) -> None:
    a, b = (kept(runs, records) for records in arms.values())
    targets = targets_of(runs, arms["MCAR"][0])
    (of_a, of_b), maps = (
        (resampled(a, targets), resampled(b, targets)),
        [[mean_ap(s, targets) for s in x] for x in (a, b)],
    )
    within = [covariance(each, each, same=True) for each in (of_a, of_b)]
    seeds = [float(np.var(each, ddof=1)) for each in maps]

    found = compare(runs, *arms.values())
    images = sum(within) - 2 * covariance(of_a, of_b, same=False)
    expected = two_levels(np.mean(maps[0]) - np.mean(maps[1]), seeds, images)
    assert [found["low"], found["high"], found["p_value"]] == pytest.approx(expected, abs=CLOSE)

    found = interval(runs, arms["MCAR"])
    expected = two_levels(float(np.mean(maps[0])), seeds[:1], within[0])
    assert [found["low"], found["high"]] == pytest.approx(expected[:2], abs=CLOSE)


def test_streams_of_the_same_runs_are_compared_run_by_run(runs: Runs, arms: dict[str, list[Record]]) -> None:
    fused, targets = kept(runs, arms["MCAR"]), targets_of(runs, arms["MCAR"][0])
    folders = [runs.artifacts / "runs" / record.run_id for record in arms["MCAR"]]
    alone = np.stack([np.load(folder / "scores.npz")["last_global"] for folder in folders])
    by_run = [mean_ap(x, targets) - mean_ap(y, targets) for x, y in zip(fused, alone, strict=True)]
    images = covariance(*[resampled(fused, targets) - resampled(alone, targets)] * 2, same=True)
    found = compare(runs, arms["MCAR"], [record.prediction("global") for record in arms["MCAR"]])
    expected = two_levels(float(np.mean(by_run)), [float(np.var(by_run, ddof=1))], images)
    assert [found["low"], found["high"], found["p_value"]] == pytest.approx(expected, abs=CLOSE)


def test_p_values_of_a_table_are_adjusted_by_holm(runs: Runs, arms: dict[str, list[Record]]) -> None:
    streams = {name: [record.prediction(name) for record in arms["MCAR"]] for name in ("fused", "local", "global")}
    pairs = {f"{a} - {b}": (streams[a], streams[b]) for a, b in itertools.combinations(streams, 2)}
    rows = differences(runs, {**pairs, "MCAR - baseline": tuple(arms.values())})  # type: ignore[dict-item]
    ascending = sorted(rows, key=lambda row: row["p"])
    for place, row in enumerate(ascending):
        expected = max(min(1, (len(rows) - before) * ascending[before]["p"]) for before in range(place + 1))
        assert row["p (Holm)"] == pytest.approx(expected, abs=CLOSE)


def test_iou_and_pointing_game_are_those_of_the_boxes_and_maps_of_the_model(
    runs: Runs, arms: dict[str, list[Record]], tiny_config: RunConfig
) -> None:
    test, size = runs.data(tiny_config).test, tiny_config.image_size
    squares = runs.splits.squares(test, size)
    objects = annotated_objects(test, size)
    for record in arms["MCAR"][:2]:
        model = runs.trained_model(record.config, num_regions=len(test.classes))
        with torch.no_grad():
            images = normalise(torch.stack([squares[i] for i in range(len(squares))]), model.mean, model.std)
            found = model(images).regions
            logits = model.class_logits(model.features(images))
            every = torch.arange(len(test.classes)).expand(len(images), -1)
            maps = attention_maps(logits, every, (size, size))
        by_iou = overlap_measures(objects, found.boxes, found.classes)[:, 1]  # the two regions that come first
        highest = maps.flatten(2).argmax(dim=2)
        points = torch.stack((highest % size, highest // size), dim=-1).double() + 0.5
        by_class = found.boxes.gather(1, found.classes.argsort(dim=1)[..., None].expand(-1, -1, 4))
        scores = torch.from_numpy(kept(runs, [record])[0])
        regions = ClassRegions(scores, by_class, points, points, size)
        game = pointing_game(objects, regions, regions)

        hits: dict[tuple[int, int], bool] = {}
        for m, (box, k, i) in enumerate(
            zip(objects.boxes.numpy(), objects.classes.tolist(), objects.images.tolist(), strict=True)
        ):
            own = any_class = 0.0
            for region, of_class in zip(found.boxes[i, :2].numpy(), found.classes[i, :2].tolist(), strict=True):
                sides = np.minimum(box[2:], region[2:]) - np.maximum(box[:2], region[:2])
                common = np.prod(sides.clip(min=0))
                iou = common / (np.prod(box[2:] - box[:2]) + np.prod(region[2:] - region[:2]) - common)
                any_class, own = max(any_class, iou), max(own, iou if of_class == k else 0.0)
            taken = k in found.classes[i, :2].tolist()
            assert by_iou[m].tolist() == [any_class >= 0.3, any_class >= 0.5, own >= 0.3, taken]
            row, column = np.unravel_index(maps[i, k].numpy().argmax(), (size, size))
            inside = box[0] <= column + 0.5 < box[2] and box[1] <= row + 0.5 < box[3]
            hits[i, k] = hits.get((i, k), False) or bool(inside)
        assert (
            dict(
                zip(
                    zip(game.images.tolist(), game.classes.tolist(), strict=True), game.hits[:, 0].tolist(), strict=True
                )
            )
            == hits
        )
