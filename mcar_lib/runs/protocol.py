"""How the numbers of the reports are made, in words: the protocol once, and what a profile does otherwise."""

from mcar_lib.runs.config import Axis, EqualCost, Profile

SEEDS, MAIN_SEEDS = 3, 5  # the least number of runs of an arm, and of each side of the main comparison

PROTOCOL = f"""\
- **Splits.** Learning rates are tuned on the data set's official train and val lists. Every run that is reported is
  trained on both together (trainval), and its result is its score on test after the last epoch.
- **Tuning.** Every arm that can change which rate is right (model, pooling, backbone, N, input size, length) gets the
  same budget: one grid of rates, widened where the best one lies on its border, one run a rate with a seed that no
  reported run has. The tables of tuning show all of these runs. All else is fixed by the profile, alike for all arms;
  the length and the schedule were set before this protocol, on test scores of earlier runs.
- **Seeds.** At least {SEEDS} runs an arm, {MAIN_SEEDS} in the main comparison. Intervals (95 %) and p-values hold both
  what other seeds and what other test images would change; the spread over seeds stands beside them. One seed carries
  no finding.
- **Findings.** A difference is a finding where p is below 0.05 after Holm's correction for the comparisons of its
  study.
- **Best epoch.** Also shown, because the paper's release reports it. It is chosen on the test images, so it is no
  measurement, and no finding here rests on it.
"""


def deviations(profile: Profile) -> list[str]:
    """What a profile does otherwise than PROTOCOL says, each as a phrase; empty where it follows it."""
    found = [] if profile.tuning else ["rates are fixed, not tuned on a val list"]
    if len(profile.seeds) < MAIN_SEEDS:
        found.append(_few(len(profile.seeds), "in the main comparison"))
    arms: list[tuple[str, Axis | EqualCost]] = [*profile.ablations.items()]
    if profile.equal_cost:
        arms.append(("equal_cost", profile.equal_cost))
    for count in sorted({len(arm.seeds) for _, arm in arms if len(arm.seeds) < SEEDS}):
        names = ", ".join(name for name, arm in arms if len(arm.seeds) == count)
        found.append(_few(count, f"an arm of {names}"))
    return found


def _few(count: int, where: str) -> str:
    return f"{count} seeds {where}" if count > 1 else f"one seed {where}, so no finding there"
