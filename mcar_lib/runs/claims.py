"""What differences say of a claim: the rows that test it, as the text of a cell, and one of four verdicts.

A row is one of mcar_lib.runs.differences, as it stands in the table that a notebook wrote.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mcar_lib.runs.comparisons import ONE_SEED, points
from mcar_lib.runs.comparisons import is_finding as is_finding

REPLICATED, NOT_REPLICATED = "replicated here", "not replicated here"
NOT_TESTED, NOTHING_PUBLISHED = "not tested here", "nothing published"
TOLD = ("compared", "difference", "low", "high", "finding")  # columns of a table of differences
CLOSE = 1.0  # points of mAP that a run of the paper's recipe may lie below the published figure
Row = Mapping[Any, Any]


def rows_like(rows: Iterable[Row], pattern: str) -> list[dict[Any, Any]]:
    """The rows whose whole name is as a pattern says, each with a label: the groups of the pattern, none for none."""
    found = [(row, re.fullmatch(pattern, row["compared"])) for row in rows]
    return [{**row, "label": " ".join(filter(None, match.groups()))} for row, match in found if match]


def agrees(row: Row, claimed: str) -> bool:
    """Whether a difference has the claimed sign: "higher", or "larger is higher" of the two numbers in its name."""
    if claimed == "higher":
        return bool(row["difference"] > 0)
    if claimed == "larger is higher":
        first, second = map(float, re.findall(r"[\d.]+(?= - )|(?<= - )[\d.]+", row["compared"]))
        return bool((row["difference"] > 0) == (first > second))
    raise ValueError(f"claimed: {claimed!r}; a direction is 'higher' or 'larger is higher'")


def verdict(published: str, claimed: str, tested: Sequence[Sequence[Row]]) -> str:
    """What becomes of a claim.

    published: what a source gives for it, "" for nothing. claimed: a direction as in `agrees`, "" where no run of ours
    tests the claim. tested: rows by data, those that count most first; the first with more than one seed decide.
    Replicated: a difference is found in the claimed direction, and none against it.
    """
    if not published:
        return NOTHING_PUBLISHED
    deciding = next((rows for rows in tested if any(row["finding"] != ONE_SEED for row in rows)), ())
    if not claimed or not deciding:
        return NOT_TESTED
    signs = [agrees(row, claimed) for row in deciding if is_finding(row)]
    return REPLICATED if signs and all(signs) else NOT_REPLICATED


def verdict_of_numbers(pairs: Sequence[tuple[float, float]]) -> str:
    """Of (published, ours) in percent: replicated where no run of ours lies more than CLOSE below."""
    if not pairs:
        return NOT_TESTED
    return REPLICATED if all(ours > published - CLOSE for published, ours in pairs) else NOT_REPLICATED


def told_in_a_cell(rows: Sequence[Row]) -> str:
    """Differences with their intervals and seeds, findings in bold; "-" for no rows."""
    several = [row for row in rows if row["finding"] != ONE_SEED]
    if not several:
        return ONE_SEED if rows else "-"
    seeds = " or ".join(dict.fromkeys(str(row.get("seeds", "?")) for row in several))
    return f"{'; '.join(map(_told, several))} (seeds: {seeds})"


def _told(row: Row) -> str:
    text = f"{row['label']}: {points(row)}" if row.get("label") else points(row)
    return f"**{text}**" if is_finding(row) else text
