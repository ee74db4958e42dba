"""How a claim is judged: a rule fixed beforehand, applied to numbers, one per seed.

A case holds where the rule is met in every seed, fails where it is met in none, and is undecided
otherwise.
"""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One setting, layer and point of training; `values` has one number per seed."""

    where: str
    values: list[float]
    threshold: float
    at_least: bool

    @property
    def holds(self) -> bool | None:
        """None: the seeds do not agree."""
        met = {value >= self.threshold if self.at_least else value <= self.threshold
               for value in self.values}  # fmt: skip
        return met.pop() if len(met) == 1 else None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper in our words, the number that decides and the rule for it."""

    sentence: str
    rule: str
    form: str  # of the numbers
    cases: list[Case]
    from_the_abstract: bool = True

    def count(self, verdict: bool | None) -> int:
        return sum(case.holds is verdict for case in self.cases)

    @property
    def verdict(self) -> str:
        total, held = len(self.cases), self.count(True)
        if total == 0:
            return "not measured"
        if held == total:
            return "holds"
        if self.count(False) == total:
            return "does not hold here"
        return f"holds in {held} of {total} cases"

    @property
    def measured(self) -> str:
        """The range of the cases, the spread over the seeds, and the case furthest off."""
        if not self.cases:
            return "no run has the numbers"
        means = [case.mean for case in self.cases]
        spreads = [max(case.values) - min(case.values) for case in self.cases]
        worst = (min if self.cases[0].at_least else max)(self.cases, key=lambda case: case.mean)
        failed, undecided = self.count(False), self.count(None)
        verdicts = f"Held in {self.count(True)}, failed in {failed}, undecided in {undecided}"
        spread = self.form.removeprefix("+")
        differ = (
            "one seed, no spread"
            if all(len(case.values) == 1 for case in self.cases)
            else f"the seeds of a case differ by {statistics.median(spreads):{spread}} (median) to "
            f"{max(spreads):{spread}}"
        )
        return (
            f"{verdicts} of {len(means)} cases. Means over the seeds: median "
            f"{statistics.median(means):{self.form}}, from {min(means):{self.form}} to "
            f"{max(means):{self.form}}; {differ}. "
            f"Furthest off: {worst.where} ({_spread(worst.values, self.form)})."
        )


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.fmean(values):{form}}, seeds {min(values):{form}} to {max(values):{form}}"
