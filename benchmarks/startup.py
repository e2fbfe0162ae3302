"""How long one waits before anything happens: each time a fresh process, in turns."""

import statistics
import subprocess
import sys
import time

from reports import Cell, Finding, Report, Table

ROUNDS = 5
# Each prints how many seconds it took after torch was there.
AFTER_TORCH = "import time, torch; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
LOAD = '`mcar_lib.load("voc-photos")`, beyond torch'
TIMED = {
    "`import mcar_lib`, beyond torch": ("import mcar_lib", 0.3),
    LOAD: ("import mcar_lib; mcar_lib.load('voc-photos')", 1.0),
}
TORCH, HELP = "`import torch` alone, a whole process", "`mcar --help`"
HELP_GOAL = 1.0
TOLD = (LOAD, HELP)  # in README


def whole_process(arguments: list[str]) -> float:
    """Wall-clock seconds from start to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def told_by_process(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(quick: bool) -> Report:
    found: dict[str, list[float]] = {name: [] for name in (*TIMED, HELP, TORCH)}
    for number in range(2 if quick else ROUNDS + 1):
        now = {name: told_by_process(AFTER_TORCH.format(code)) for name, (code, _) in TIMED.items()}
        now |= {HELP: whole_process(["-m", "mcar_lib", "--help"]), TORCH: whole_process(["-c", "import torch"])}
        for name, seconds in now.items():
            if number:  # the first round reads files that the next find in memory
                found[name].append(seconds)
    each = {name: statistics.median(seconds) for name, seconds in found.items()}
    goals = {**{name: goal for name, (_, goal) in TIMED.items()}, HELP: HELP_GOAL}
    findings = tuple(
        Finding(what=name, ours=each[name], unit="s", at_most=goal, in_readme=name in TOLD)
        for name, goal in goals.items()
    )
    rows: list[tuple[Cell, ...]] = [(name, each[name], min(found[name]), max(found[name])) for name in found]
    return Report(
        title="Start-up",
        about="Seconds until something is there, each time in a fresh process whose files the system has in memory. "
        "Beyond torch: counted from where torch has been imported, which takes what the last row of the table says.",
        findings=findings,
        tables=(Table(heading="All", columns=("what", "s", "least", "most"), rows=tuple(rows)),),
        notes=(f"Medians of {len(found[TORCH])} processes each, in turns.",),
    )
