"""What the ablation notebooks share: how each arm got its learning rate, tests with other values, the first line.

compared, in what follows: the rows of mcar_lib.runs.differences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mcar_lib.errors import MCARError
from mcar_lib.files import project_root
from mcar_lib.runs import (
    NO_DIFFERENCE,
    ONE_SEED,
    Axis,
    Failure,
    Prediction,
    Record,
    RunConfig,
    Runs,
    tested,
    told,
    tuning_rows,
)

COMMITTED = "photos"  # the profile whose finding stands where a study makes none of its own


def changed(axis: Axis) -> str:
    """What all runs of an axis have otherwise than their profile's own run: 'image_size = 160'."""
    return ", ".join(f"{name} = {value}" for name, value in axis.change.items()) or "nothing"


def tuning_table(runs: Runs, configs: Sequence[RunConfig]) -> pd.DataFrame:
    """One row an arm: the rate that it has, and what each rate came to on val (percent), NaN where it was not tried. A
    profile that fixes its rates tried none."""
    if runs.profile.tuning is None:
        rates = {config.label.removesuffix(f"-s{config.seed}"): config.learning_rate for config in configs}
        return pd.DataFrame({"arm": list(rates), "chosen rate": list(rates.values())})
    rows = pd.DataFrame(tuning_rows(runs, configs))
    chosen = rows[rows["chosen"] != ""].set_index("arm")["learning rate"].rename("chosen rate")
    values = rows.pivot(index="arm", columns="learning rate", values="mAP on val").rename(
        columns="val mAP at {:g}".format
    )
    return values.join(chosen)[["chosen rate", *values]].loc[list(dict.fromkeys(rows["arm"]))].reset_index()


def each_tested(
    runs: Runs, found: Sequence[Record | Failure], **changes: int | float | str
) -> list[Prediction | Failure]:
    """Each run tested with other values (mcar_lib.runs.tested); a Failure where it, or its test, could not be had."""
    tests: list[Prediction | Failure] = []
    for each in found:
        try:
            tests.append(each if isinstance(each, Failure) else tested(runs, each, **changes))
        except MCARError as error:  # no photos to test on, say: the other rows are still there
            tests.append(Failure(each.config, f"{type(error).__name__}: {error}"))
    return tests


def answer_of(study: str, compared: Mapping[str, pd.DataFrame], values: Mapping[str, str]) -> str:
    """The first line of a study: for each profile its values and which differences hold.

    A profile with one seed a setting says so and makes no finding. Where none makes one, that of the committed photos
    follows. compared, values: by profile.
    """
    lines = {name: _line(name, table, values[name]) for name, table in compared.items()}
    kept = project_root() / "results" / COMMITTED / "tables" / f"{study}_differences.csv"
    if not any(map(_makes_findings, compared.values())) and COMMITTED not in compared and kept.exists():
        lines[COMMITTED] = f"On the {COMMITTED} (committed): {told(_rows(pd.read_csv(kept)))}"
    return f"**Answer.** {' '.join(lines.values())}"


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _makes_findings(compared: pd.DataFrame) -> bool:
    return not compared.empty and bool((compared["finding"] != ONE_SEED).any())


def _line(name: str, compared: pd.DataFrame, values: str) -> str:
    if compared.empty:
        return f"{name}: runs are missing, so nothing is compared."
    if not _makes_findings(compared):
        return f"{name}: one seed a setting, so no finding of its own."
    rows = [row for row in _rows(compared) if row["finding"] != ONE_SEED]
    held = [f"{row['compared']} {row['difference']:+.1f}" for row in rows if row["finding"] != NO_DIFFERENCE]
    which = f": {'; '.join(held)}" if held else ""
    return f"{name}: {values}; {len(held)} of {len(rows)} differences hold{which}."
