"""What all committed records say together: results/README.md with the claims table, and the README's number blocks."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from mcar_lib.ablations import NO_DIFFERENCE, StudyResult, interval_text, study_finding
from mcar_lib.config import load_profile
from mcar_lib.errors import ResultsError
from mcar_lib.experiment import BASELINE, METHOD, Record, current_record, read_records
from mcar_lib.plan import key_of
from mcar_lib.report import (
    MainResult,
    finding,
    load_main_result,
    load_studies,
    markdown,
    read_published,
    write_text,
)

PROFILES = ("mini", "photos", "photos-coco", "paper")  # those whose numbers mean something, in the order they are shown
BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
REPLICATED, NOT_REPLICATED = "replicated at this scale", "not replicated at this scale"
RELEASE_POINTS = {"all": "0.6", "top-3": "0.6 top-3"}  # of OPERATING_POINTS
NEEDS_PAPER, NO_SOURCE = "needs the paper profile", "no source found"


@dataclass(frozen=True)
class Committed:
    """The main comparison and the ablations of one profile, as far as they were run."""

    main: MainResult
    studies: Mapping[str, StudyResult]


def write_summary(results: Path, readme: Path) -> list[Path]:
    """results/README.md and the generated blocks of README.md, from the committed records. Returns what it wrote."""
    found = {}
    for name in PROFILES:
        profile = load_profile(name)
        main = load_main_result(results / name, profile)
        if main is not None:
            found[name] = Committed(main, load_studies(results / name, profile))
    written = [write_text(results / "README.md", summary_text(found, load_rows(results)))]
    blocks = {"main-results": main_block(found)}
    return [*written, write_text(readme, fill_blocks(readme.read_text(encoding="utf-8"), blocks, readme))]


def load_rows(results: Path) -> dict[tuple[str, str, int], Record]:
    """The records of the paper profile's rows that were scored on the whole data sets, by what tells the rows apart."""
    profile, records = load_profile("paper"), read_records(results / "paper")
    found = [current_record(records, profile.row(name)) for name in profile.rows]
    scored = [each for each in found if each is not None and each.is_scored]
    return {key_of(each.config): each for each in scored if not each.content["data"]["subset"]}


def fill_blocks(text: str, blocks: Mapping[str, str], where: Path) -> str:
    """Replaces what stands between the markers; raises ResultsError if a block has no markers or no content."""
    names = [match["name"] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks):
        raise ResultsError(f"{where}: its generated blocks are {names}, wanted {sorted(blocks)}; mend the markers")
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}{match[3]}", text)


def main_block(found: Mapping[str, Committed]) -> str:
    """The main comparison of every profile that was run, one row each."""
    rows = []
    for name, committed in found.items():
        result = committed.main
        means, best = (
            {model: 100 * fmean(record.map(epoch=epoch) for record in group) for model, group in result.runs.items()}
            for epoch in ("last", "best")
        )
        diff = result.comparison
        rows.append(
            {
                "profile": name,
                "test data": result.data["test"],
                "runs": len(result.records),
                f"{BASELINE} mAP": means[BASELINE],
                f"{METHOD} mAP": means[METHOD],
                "difference (95 % interval)": interval_text(diff),
                "finding": finding(diff),
                "best epoch (both)": f"{best[BASELINE]:.1f}, {best[METHOD]:.1f}",
            }
        )
    return markdown(pd.DataFrame(rows)) if rows else "No committed records yet.\n"


def summary_text(found: Mapping[str, Committed], rows: Mapping[tuple[str, str, int], Record]) -> str:
    """results/README.md: what each folder holds, the claims table, and the published figures with their sources."""
    out = io.StringIO()
    out.write(
        "# Results\n\n"
        "Written by `make report` from the run records in this folder; do not edit by hand.\n\n"
        "- `published/`: figures published by others, each row with its source; never mixed with ours\n"
        "- `<profile>/runs/`: one JSON record a run; `evaluations/`: a run tested with other values; `comparisons/`: "
        "intervals\n"
        "- `<profile>/tables/`, `<profile>/figures/`: drawn from those records\n"
        "- `local/` (not committed): what `make reproduce` computes on your machine\n\n"
        "All numbers are of the last epoch unless a table says best; the paper's release reports the best epoch on "
        "the test set.\n\n## Our runs\n\n"
    )
    out.write(main_block(found))
    out.write(_ablations_text(found))
    out.write("\n## Claims of the paper\n\n")
    out.write(markdown(claims_table(found, rows)))
    out.write(
        "\n*Replicated at this scale*: the sign agrees and the 95 % paired interval excludes zero. Published figures "
        "belong to the full data sets and the paper's recipe; only the profile `paper` can be held against them, at "
        "the best epoch on the test set, which is what the release reports. `mcar plan` lists its rows with their cost "
        "and their commands.\n"
    )
    return out.getvalue()


def _ablations_text(found: Mapping[str, Committed]) -> str:
    """What each ablation found under each profile, with its table and figure."""
    out = io.StringIO()
    for name, committed in found.items():
        for study, result in committed.studies.items():
            table, figure = (f"{name}/{kind}/ablation_{study}" for kind in ("tables", "figures"))
            links = f"[table]({table}.md), [differences]({table}_differences.md), [figure]({figure}.png)"
            changed = "".join(f"{key} = {value}, " for key, value in result.changed.items())
            out.write(f"- **{study}**, profile {name} ({changed}{links}): {study_finding(result)}\n")
    heading = (
        "\n## Ablations\n\nDifferences that hold with an adjusted p (Holm) below 0.05, in points of mAP with 95 % "
        "paired intervals over test images. Values in brackets are those in which all runs of a study differ from "
        "their profile's own run; a finding holds for runs with these values, and need not hold for others.\n\n"
    )
    return heading + out.getvalue() if out.getvalue() else ""


def claims_table(found: Mapping[str, Committed], rows: Mapping[tuple[str, str, int], Record]) -> pd.DataFrame:
    """Each claim: the published value and its source, ours under each profile that was run, and the verdict.

    rows: the paper profile's records by data set, backbone and input size; they stand beside the published figures.
    """
    lines = []
    for claim in read_published("claims.csv", text=True).itertuples():
        ours, verdict = MEASURES[str(claim.measured_by).partition(":")[0]](found, str(claim.measured_by))
        verdict = NO_SOURCE if claim.source == NO_SOURCE else verdict
        lines.append([claim.claim, claim.published or "-", claim.source, ours or "not run", verdict])
    for cell in read_published("map.csv").itertuples():
        what = f"mAP of {cell.backbone} at {cell.image_size} px on {cell.dataset}"
        record = rows.get((str(cell.dataset), str(cell.backbone), int(str(cell.image_size))))
        lines.append([what, f"{cell.percent}", cell.source, *_held_against(cell.percent, record, "all", "mAP")])
    for cell in read_published("coco2014_resnet101_448.csv").itertuples():
        what = f"{cell.metric} ({cell.labels} labels) of resnet101 at 448 px on coco2014"
        record = rows.get(("coco2014", "resnet101", 448))
        found_here = _held_against(cell.percent, record, str(cell.labels), str(cell.metric))
        lines.append([what, f"{cell.percent}", cell.source, *found_here])
    return pd.DataFrame(lines, columns=["claim", "published", "source", "ours", "verdict"])


def _held_against(published: Any, record: Record | None, labels: str, metric: str) -> tuple[str, str]:
    """Ours at the best epoch, as the release reports, and at the last; the verdict is the difference in points."""
    if record is None:
        return "-", NEEDS_PAPER
    streams = [record.stream(epoch=epoch) for epoch in ("best", "last")]
    points = [stream if metric == "mAP" else stream["at"][RELEASE_POINTS[labels]] for stream in streams]
    best, last = (100 * float(point[metric]) for point in points)
    return f"{best:.1f} (last epoch {last:.1f})", f"{best - float(published):+.1f} points"


def _by_profile(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _main(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    comparisons = {name: committed.main.comparison for name, committed in found.items()}
    verdicts = {name: REPLICATED if each["low"] > 0 else NOT_REPLICATED for name, each in comparisons.items()}
    ours = _by_profile({name: interval_text(each) for name, each in comparisons.items()})
    return ours, _by_profile(verdicts) or NEEDS_PAPER


def _parameters(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    records = [record for committed in found.values() for record in committed.main.records]
    costs = sorted({record.content["cost"]["parameters_over_backbone"] for record in records})
    ours = ", ".join(f"{count:,}" for count in costs)
    return (f"{ours} parameters over the backbone", "replicated") if costs else ("", NEEDS_PAPER)


def _per_class(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    return _by_profile({name: f"[table]({name}/tables/per_class_ap.md)" for name in found}), NO_SOURCE


def _cost(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    texts = {}
    for name, committed in found.items():
        macs = {model: group[0].content["cost"]["macs_per_image"] / 1e9 for model, group in committed.main.runs.items()}
        texts[name] = ", ".join(f"{model} {value:.2f} GMACs" for model, value in macs.items())
    return _by_profile(texts), NO_SOURCE


def _study(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    """The settings of a study's MCAR runs; with a colon behind the study's name, those of one thing it varies."""
    study, _, part = measured_by.partition(":")
    results = {name: committed.studies[study] for name, committed in found.items() if study in committed.studies}
    return _by_profile({name: _settings_text(result, part) for name, result in results.items()}), NEEDS_PAPER


def _input_size(found: Mapping[str, Committed], measured_by: str) -> tuple[str, str]:
    """Replicated where a larger input is better in at least one comparison and worse in none."""
    ours, _ = _study(found, measured_by)
    verdicts = {}
    for name, committed in found.items():
        if measured_by in committed.studies:
            pairs = [d for d in committed.studies[measured_by].differences if d.first.model == d.second.model == METHOD]
            shown = [d for d in pairs if d.finding != NO_DIFFERENCE]
            agree = [(float(d.first.value) > float(d.second.value)) == (d.finding == "higher") for d in shown]
            verdicts[name] = REPLICATED if agree and all(agree) else NOT_REPLICATED
    return ours, _by_profile(verdicts) or NEEDS_PAPER


def _settings_text(result: StudyResult, part: str) -> str:
    of_method = [o for o in result.outcomes if o.setting.model == METHOD and part in o.setting.varied and o.metrics]
    texts: dict[str, list[str]] = {}
    for outcome in of_method:
        percent = 100 * fmean(metrics["mAP"] for metrics in outcome.metrics)
        ends = [100 * outcome.interval[end] for end in ("low", "high") if outcome.interval]
        interval = " ({:.1f} to {:.1f})".format(*ends) if ends else ""
        texts.setdefault(outcome.setting.varied, []).append(f"{outcome.setting.value} gives {percent:.1f}{interval}")
    differences = [d for d in result.differences if part in d.first.varied and d.first.model == d.second.model]
    shown = [d for d in differences if d.finding != NO_DIFFERENCE]
    values = ", ".join(f"{varied} {', '.join(each)}" for varied, each in texts.items())
    return f"{values} mAP ({len(shown)} of {len(differences)} differences hold)"


MEASURES: dict[str, Callable[[Mapping[str, Committed], str], tuple[str, str]]] = {
    "main": _main,
    "parameters": _parameters,
    "per_class": _per_class,
    "cost": _cost,
    "input_size": _input_size,
    "backbone": _study,
    "pooling": _study,
    "num_regions": _study,
    "regions": _study,
}
