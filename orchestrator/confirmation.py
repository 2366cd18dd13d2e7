"""The confirmation: which seeds the arms of a study run next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import contest
from orchestrator.backlog import Backlog
from orchestrator.contest import Fixed
from orchestrator.ledger import BEST_ARM, PRESET_ARM, SETTLED, Arm, OpenLedger
from orchestrator.study import ConfirmPlan, Study
from trainer.protocol import COMPLETE

Wanted = Mapping[str, tuple[int, dict[str, Any]]]
"""(trial, params) by arm."""


class Confirmation:
    """All seeds at once, or as many as a race needs."""

    def __init__(self, study: Study, *, ledger: OpenLedger, backlog: Backlog, baseline: Fixed | None = None) -> None:
        self.study = study
        self.ledger = ledger
        self.backlog = backlog
        self.baseline = baseline

    def seeds(self, wanted: Wanted) -> tuple[int, ...]:
        """The seeds that these arms should run by now."""
        plan = self.study.confirm
        assert plan is not None, "asked where there is a confirmation"
        if not plan.sequential:
            return plan.seeds
        asked = min(self._asked(name, params, plan) for name, (_, params) in wanted.items())
        if asked < plan.first:
            return plan.seeds[: plan.first]
        arms = [self.ledger.now.arms[name] for name in wanted]
        if any(self.backlog.standing(run_id) != SETTLED for arm in arms for run_id in arm.runs.values()):
            return plan.seeds[:asked]
        return plan.seeds[: asked + plan.step] if self._is_open(plan, asked) else plan.seeds[:asked]

    def _asked(self, name: str, params: dict[str, Any], plan: ConfirmPlan) -> int:
        """Seeds of the plan that an arm with these params has been asked for, from the first on without a gap."""
        arm = self.ledger.now.arms.get(name)
        if arm is None or arm.params != params:
            return 0
        return next((n for n, seed in enumerate(plan.seeds) if seed not in arm.runs), len(plan.seeds))

    def _is_open(self, plan: ConfirmPlan, asked: int) -> bool:
        """Whether another seed may decide what the seeds so far have not."""
        arms = self.ledger.now.arms
        ours = arms.get(BEST_ARM) or arms.get(PRESET_ARM)
        theirs = arms.get(PRESET_ARM)
        if ours is None or (self.baseline is None and (theirs is None or theirs is ours)):
            return False
        scores = self._scores(ours)
        baseline = self._scores(theirs) if self.baseline is None and theirs is not None else self.baseline
        if not scores or baseline is None or baseline == {}:  # whatever fails so far would go on failing
            return False
        return not contest.race_of(plan, scores, baseline, ended=asked).is_over

    def _scores(self, arm: Arm) -> dict[int, float]:
        """Bits per byte of the objective by seed, of the runs that have them."""
        results = {seed: self.backlog.results.get(run_id) for seed, run_id in arm.runs.items()}
        return {
            seed: result.scores[self.study.search.objective].bpb
            for seed, result in results.items()
            if result is not None and result.status == COMPLETE and self.study.search.objective in result.scores
        }
