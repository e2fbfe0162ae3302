"""Runs: what one is, its record, found or trained, many side by side, and what records say beside one another."""

from mcar_lib.runs.comparisons import (
    NO_DIFFERENCE,
    ONE_SEED,
    compare,
    differences,
    grouped,
    interval,
    points,
    scores_of,
    summarise,
    tested,
    told,
)
from mcar_lib.runs.config import BASELINE, METHOD, Axis, Profile, RunConfig, load_profile, make_config
from mcar_lib.runs.grid import find_or_train
from mcar_lib.runs.measures import OPERATING_POINTS, STREAMS
from mcar_lib.runs.protocol import PROTOCOL, deviations
from mcar_lib.runs.records import Failure, Prediction, Record, read_records
from mcar_lib.runs.runs import Runs, open_runs
from mcar_lib.runs.tuning import choose, tune, tuning_rows

__all__ = [
    "BASELINE",
    "METHOD",
    "NO_DIFFERENCE",
    "ONE_SEED",
    "OPERATING_POINTS",
    "PROTOCOL",
    "STREAMS",
    "Axis",
    "Failure",
    "Prediction",
    "Profile",
    "Record",
    "RunConfig",
    "Runs",
    "choose",
    "compare",
    "deviations",
    "differences",
    "find_or_train",
    "grouped",
    "interval",
    "load_profile",
    "make_config",
    "open_runs",
    "points",
    "read_records",
    "scores_of",
    "summarise",
    "tested",
    "told",
    "tune",
    "tuning_rows",
]
