"""The claims of the paper: their verdicts follow a rule, their figures have sources, their rows are there."""

import re
from pathlib import Path

import pandas as pd
import pytest

from mcar_lib.runs import NO_DIFFERENCE, ONE_SEED, PROTOCOL, deviations, load_profile
from mcar_lib.runs.claims import (
    NOT_REPLICATED,
    NOT_TESTED,
    NOTHING_PUBLISHED,
    REPLICATED,
    agrees,
    rows_like,
    told_in_a_cell,
    verdict,
    verdict_of_numbers,
)
from mcar_lib.tables import read_published

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = list(read_published("claims.csv").itertuples())
TESTED = [claim for claim in CLAIMS if claim.claimed != "published"]


def row(difference: float, finding: str, compared: str = "MCAR - baseline") -> dict[str, object]:
    ends = {"low": difference - 1, "high": difference + 1}
    return {"compared": compared, "difference": difference, **ends, "seeds": "5 and 3", "finding": finding}


UP, DOWN, NONE, ONE = row(2, "higher"), row(-2, "lower"), row(0.5, NO_DIFFERENCE), row(9, ONE_SEED)


@pytest.mark.parametrize(
    ("photos", "scenes", "expected"),
    [
        ([UP], [], REPLICATED),
        ([UP, NONE], [], REPLICATED),
        ([UP, DOWN], [], NOT_REPLICATED),
        ([DOWN], [], NOT_REPLICATED),
        ([NONE], [UP], NOT_REPLICATED),
        ([UP, ONE], [DOWN], REPLICATED),
        ([ONE], [UP], REPLICATED),
        ([], [UP], REPLICATED),
        ([ONE], [ONE], NOT_TESTED),
        ([], [], NOT_TESTED),
    ],
)
def test_the_photos_decide_and_single_seeds_do_not(photos: list, scenes: list, expected: str) -> None:
    assert verdict("94.8", "higher", [photos, scenes]) == expected


def test_without_a_source_nothing_is_replicated_and_without_a_test_neither() -> None:
    assert verdict("", "higher", [[UP]]) == NOTHING_PUBLISHED
    assert verdict("94.8", "", [[UP]]) == NOT_TESTED


def test_a_direction_between_sizes_is_read_from_their_names() -> None:
    larger, smaller = row(2, "higher", "input size 288 - 224, MCAR"), row(-2, "lower", "input size 96 - 224, MCAR")
    assert agrees(larger, "larger is higher")
    assert agrees(smaller, "larger is higher")
    assert not agrees({**larger, "difference": -2}, "larger is higher")
    with pytest.raises(ValueError, match="larger is higher"):
        agrees(larger, "better")


def test_a_published_figure_is_reached_within_a_point() -> None:
    assert verdict_of_numbers([]) == NOT_TESTED
    assert verdict_of_numbers([(94.8, 94.0), (83.8, 85.0)]) == REPLICATED
    assert verdict_of_numbers([(94.8, 94.9), (83.8, 82.7)]) == NOT_REPLICATED


def test_a_cell_has_differences_intervals_and_seeds_and_findings_in_bold() -> None:
    rows = rows_like([row(2, "higher", "N = 1 - 4"), row(0.5, NO_DIFFERENCE, "N = 8 - 4"), UP], r"(N = .*)")
    expected = "**N = 1 - 4: +2.0 (+1.0 to +3.0)**; N = 8 - 4: +0.5 (-0.5 to +1.5) (seeds: 5 and 3)"
    assert told_in_a_cell(rows) == expected
    assert told_in_a_cell([ONE]) == ONE_SEED
    assert told_in_a_cell([]) == "-"


# ---- results/published/claims.csv


def test_the_claims_are_few() -> None:
    assert len(CLAIMS) <= 12


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.claim)
def test_what_a_claim_says_was_published_stands_in_a_table_with_its_source(claim) -> None:  # type: ignore[no-untyped-def]
    tables = ("map.csv", "baselines_by_others.csv", "coco2014_resnet101_448.csv")
    sourced = {f"{percent}" for name in tables for percent in read_published(name)["percent"]}
    assert set(re.findall(r"\d+\.\d", claim.published)) <= sourced
    assert claim.source.startswith("published/" if claim.published else "no source found")


@pytest.mark.parametrize("claim", TESTED, ids=lambda claim: claim.claim)
def test_the_rows_that_a_claim_names_are_there_on_the_photos(claim) -> None:  # type: ignore[no-untyped-def]
    table = pd.read_csv(ROOT / "results" / "photos" / "tables" / f"{claim.table}.csv")
    rows = rows_like(table.to_dict("records"), claim.compared)
    assert rows
    assert all(isinstance(agrees(each, claim.claimed), bool) for each in rows if claim.claimed)


# ---- the protocol


def test_the_photos_follow_the_protocol() -> None:
    photos = load_profile("photos")
    assert deviations(photos) == []
    assert photos.tuning is not None
    reported = {*photos.seeds, *(seed for axis in photos.ablations.values() for seed in axis.seeds)}
    assert photos.tuning.seed not in reported
    assert "At least 3 runs an arm, 5 in the main comparison" in PROTOCOL


def test_a_profile_that_falls_short_of_the_protocol_says_so() -> None:
    photos = load_profile("photos")
    axis = photos.axis("pooling").model_copy(update={"seeds": (0,)})
    short = photos.model_copy(update={"tuning": None, "seeds": (0, 1), "ablations": {"pooling": axis}})
    assert deviations(short) == [
        "rates are fixed, not tuned on a val list",
        "2 seeds in the main comparison",
        "one seed an arm of pooling, so no finding there",
    ]
