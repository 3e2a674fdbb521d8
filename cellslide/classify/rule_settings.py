"""The settings of a rule as they are given, before the classes of a classifier are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cellslide.classify.columns import Rule
from cellslide.classify.decision import DecisionConfig, GateRule, default_gate, read_prior, read_thresholds
from cellslide.classify.taxonomy import load_taxonomy
from cellslide.config import ClassifyConfig
from cellslide.errors import UsageError
from cellslide.types import Calibration, ClassifierSpec


@dataclass(frozen=True, slots=True)
class RuleSettings:
    """The flags of the decision, see `DecisionConfig`; `thresholds` is a file, `taxonomy` a name or a file.

    `gate` None is the rule of the paths that run by default: the mix, or the local path where that runs alone.
    """

    gate: GateRule | None = None
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
        decision = DecisionConfig(
            self.gate or default_gate(calibration), self.tau, self.gamma, thresholds, self.abstain, prior
        )
        taxonomy = None if self.taxonomy is None else load_taxonomy(self.taxonomy, names)
        rule = Rule(decision, calibration, names, taxonomy)
        rule.check()
        return rule

    def network(self, config: ClassifyConfig) -> ClassifyConfig:
        """Return the settings of the network that this rule needs: a rule of both paths runs both.

        Raises UsageError for a rule of a path that the settings leave out.
        """
        if self.gate in (None, "local"):
            return config
        if config.paths == "local" and self.gate != "mix":
            raise UsageError(f"--gate {self.gate}: needs the global path, which --paths local leaves out")
        return config if config.paths else replace(config, paths="both")
