"""The settings of a rule as they are given, before the classes of a classifier are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cellslide.classify.columns import Rule
from cellslide.classify.decision import DecisionConfig, GateRule, read_prior, read_thresholds
from cellslide.classify.taxonomy import load_taxonomy
from cellslide.types import Calibration, ClassifierSpec


@dataclass(frozen=True, slots=True)
class RuleSettings:
    """The flags of the decision, see `DecisionConfig`; `thresholds` is a file, `taxonomy` a name or a file."""

    gate: GateRule = "mix"
    tau: float | None = None
    gamma: float | None = None
    thresholds: Path | None = None
    abstain: float | None = None
    prior: str | None = None
    taxonomy: str | None = None

    def rule(self, spec: ClassifierSpec, calibration: Calibration | None = None) -> Rule:
        """Return the rule for the classes of a classifier, checked; `calibration` stands for that of its weights.

        Raises UsageError for settings that do not suit the classes, or need what the calibration does not hold.
        """
        names, calibration = tuple(c.name for c in spec.classes), calibration or spec.calibration
        thresholds = None if self.thresholds is None else read_thresholds(self.thresholds, names)
        prior = None if self.prior is None else read_prior(self.prior, names, calibration)
        decision = DecisionConfig(self.gate, self.tau, self.gamma, thresholds, self.abstain, prior)
        taxonomy = None if self.taxonomy is None else load_taxonomy(self.taxonomy, names)
        rule = Rule(decision, calibration, names, taxonomy)
        rule.check()
        return rule
