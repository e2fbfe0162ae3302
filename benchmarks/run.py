"""Every benchmark, one after another, each in a process of its own: make bench.

    python benchmarks/run.py [--only startup,metrics] [--output DIR] [--data-root DIR] [--quick]

Writes NAME.json (all that was measured), NAME.md (the page) and some NAME.png into results/benchmarks, and README's
table from all that lies there. A benchmark that fails leaves its earlier files as they were, the others go on, and the
exit code is 1. --quick tries that everything runs, in a minute or two, with numbers that mean nothing, and writes into
results/local/benchmarks. DIR holds VOCdevkit/VOC2007 (by default $MCAR_DATA); without photos, what needs them is left
out with a line. The whole takes 15 to 25 minutes on two quiet cores.

A benchmark is a file beside this one with measure(quick) -> Report, and a line in TOPICS. If its report has alt, it has
draw(report) -> Figure too. It may raise Skipped.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from reports import Began, Conditions, Record, Report, circumstances, page, summary
from timing import DATA_ROOT, Skipped

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "benchmarks"  # of README
# In the order of README's table; a new benchmark adds its name.
TOPICS = (
    "inference",
    "training",
    "memory",
    "regions",
    "scaling",
    "reading",
    "prediction",
    "export",
    "metrics",
    "bootstrap",
    "startup",
)
LONGEST = 1800  # seconds; what takes longer has hung
LOOKED = 2.0  # seconds in which it is counted what other programs take
MEASURED, SKIPPED, FAILED = "measured", "left out", "failed"


def measured(topic: str, quick: bool, into: Path) -> None:
    """In the process of one benchmark: writes report.json, and picture.png if it draws one."""
    from mcar_lib.runs.environment import describe_environment

    module = importlib.import_module(topic)
    try:
        report: Report = module.measure(quick)
    except Skipped as reason:
        (into / "skipped").write_text(str(reason), encoding="utf-8")
        return
    if report.alt:
        module.draw(report).savefig(into / "picture.png", dpi=150, metadata={"Software": None})
    content = {"report": report.model_dump(mode="json"), "environment": describe_environment()}
    (into / "report.json").write_text(json.dumps(content), encoding="utf-8")


def benchmark(topic: str, command: Sequence[str], output: Path, began: Began) -> str:
    """Measures one in a fresh process and writes its files. Returns MEASURED, SKIPPED or FAILED.

    command: what is started, with the folder that it writes into as one more argument.
    """
    with tempfile.TemporaryDirectory() as folder:
        into, before, start = Path(folder), busy(), time.monotonic()
        try:
            subprocess.run([*command, str(into)], check=True, timeout=LONGEST, env=environment(), cwd=ROOT)
            conditions = Conditions(began, before, time.monotonic() - start)
            if (reason := into / "skipped").exists():
                print(f"{topic}: left out, {reason.read_text(encoding='utf-8')}", flush=True)
                return SKIPPED
            print(f"\n{written(topic, into, output, conditions)}", flush=True)
        except Exception as error:  # whatever happened to one, the others go on
            print(f"{topic}: failed ({error}); its earlier files stay as they were", file=sys.stderr, flush=True)
            return FAILED
    return MEASURED


def written(topic: str, measured_into: Path, output: Path, conditions: Conditions) -> str:
    """Writes the files of a benchmark that was measured, once all of them are known; returns its page."""
    from mcar_lib.files import read_json, write_bytes, write_json, write_text

    found = read_json(measured_into / "report.json")
    was = circumstances(found["environment"], conditions, after=busy())
    record = Record(topic=topic, report=Report.model_validate(found["report"]), circumstances=was)
    text, picture = page(record), (measured_into / "picture.png").read_bytes() if record.report.alt else None
    if picture:
        write_bytes(output / f"{topic}.png", picture)
    write_json(output / f"{topic}.json", record.content())
    write_text(output / f"{topic}.md", text)
    return text


def busy() -> float:
    """The share of the processors that other programs have now; nothing of this run must be going on."""
    return psutil.cpu_percent(interval=LOOKED) / 100


def environment() -> dict[str, str]:
    """The library of this checkout, wherever one may be installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def records(folder: Path) -> list[Record]:
    """What lies in a folder, in the order of TOPICS."""
    paths = [folder / f"{topic}.json" for topic in TOPICS]
    return [Record.read(path) for path in paths if path.exists()]


def run(topics: Sequence[str], output: Path, quick: bool, readme: Path | None) -> Mapping[str, str]:
    """Topic -> how it ended. readme: the page whose table is filled in."""
    from mcar_lib.runs.environment import describe_environment
    from mcar_lib.tables import fill_blocks

    began = Began(os.getloadavg()[0], describe_environment()["commit"], quick)
    ended = {}
    for topic in topics:
        print(f"{topic}: measured since {time.strftime('%H:%M:%S')}", flush=True)
        command = [sys.executable, __file__, "--measure", topic, *(["--quick"] if quick else []), "--into"]
        ended[topic] = benchmark(topic, command, output, began)
    if readme and (found := records(output)):
        fill_blocks(readme, {BLOCK: summary(found)})
    return ended


def chosen(only: str) -> tuple[str, ...]:
    """The topics of --only, in their order; all of them where it is empty. Ends the program for an unknown name."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TOPICS]:
        raise SystemExit(f"--only: there is no benchmark {', '.join(unknown)}; choose from {', '.join(TOPICS)}")
    return tuple(topic for topic in TOPICS if not names or topic in names)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default="", metavar="NAMES", help=f"with commas: {', '.join(TOPICS)}")
    made.add_argument("--output", type=Path, metavar="DIR", help="other than results/benchmarks; README then stays")
    made.add_argument("--data-root", type=Path, metavar="DIR", help="holds VOCdevkit/VOC2007")
    made.add_argument("--quick", action="store_true", help="only try that everything runs")
    made.add_argument("--measure", help=argparse.SUPPRESS)
    made.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.measure:
        measured(options.measure, options.quick, options.into)
        return 0
    if options.data_root:
        os.environ[DATA_ROOT] = str(options.data_root.resolve())
    kept = ROOT / "results" / "benchmarks"
    output = options.output or (ROOT / "results" / "local" / "benchmarks" if options.quick else kept)
    readme = ROOT / "README.md" if output.resolve() == kept and not options.quick else None
    ended = run(chosen(options.only), output, options.quick, readme)
    print("\n".join(f"{topic}: {how}" for topic, how in ended.items()))
    return int(FAILED in ended.values())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
