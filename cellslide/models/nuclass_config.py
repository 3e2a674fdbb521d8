"""Sizes of a NuClass, as a manifest entry or a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cellslide.models.backbones import BackboneConfig


@dataclass(frozen=True, slots=True)
class NuClassConfig:
    """Sizes of a NuClass; the defaults are the published ones.

    num_organs        named organs; 0 leaves the organ out of the local path.
    learned_unknown   one more embedding stands for an unknown organ; else an unknown organ modulates nothing.
    context           backbone of the context; None leaves global path and gate out.
    share_backbone    the global path reads the local path's backbone instead of one of its own.
    gate              False leaves the fusion gate out: the global path then decides alone (g = 1).
    local_aware_gate  holds the gate that the published code trains path global with; it is never called.
    organ_width, film_width, head_width, proj_width, gate_width, gate_hidden
                      length of the organ embedding, hidden widths of FiLM and heads, of the two projections that are
                      concatenated, of the gate's projections and of its MLP.
    """

    num_classes: int = 16
    num_organs: int = 8
    local: BackboneConfig = field(default_factory=lambda: BackboneConfig("uni2_h"))
    context: BackboneConfig | None = field(default_factory=lambda: BackboneConfig("dinov3_vitl16"))
    share_backbone: bool = False
    gate: bool = True
    local_aware_gate: bool = False
    learned_unknown: bool = False
    organ_width: int = 64
    film_width: int = 128
    head_width: int = 1024
    proj_width: int = 512
    gate_width: int = 128
    gate_hidden: tuple[int, int] = (256, 64)
    head_dropout: float = 0.2
    gate_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes {self.num_classes}: must be at least 2")
        if self.num_organs < 0:
            raise ValueError(f"num_organs {self.num_organs}: must not be negative")
        first, second = (int(n) for n in self.gate_hidden)
        object.__setattr__(self, "gate_hidden", (first, second))

    @classmethod
    def of(
        cls, config: Mapping[str, Any], num_classes: int | None = None, num_organs: int | None = None
    ) -> NuClassConfig:
        """Return the sizes that plain values give: backbones as {name, args, pool} or a name alone, null for none.

        Raises TypeError for keys that are not known, ValueError for values that are not possible.
        """
        values = dict(config)
        for key in ("local", "context"):
            if key in values:
                values[key] = _backbone_config(values[key])
        if num_classes is not None:
            values["num_classes"] = num_classes
        if num_organs is not None:
            values["num_organs"] = num_organs
        return cls(**values)

    @property
    def organ_rows(self) -> int:
        """Rows of the organ embedding."""
        return self.num_organs + int(self.learned_unknown)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `of` reads back; classes and organs are counted by who lists them, so not here."""
        plain = asdict(self) | {"gate_hidden": list(self.gate_hidden)}
        return {key: value for key, value in plain.items() if key not in ("num_classes", "num_organs")}


def _backbone_config(raw: Any) -> BackboneConfig | None:
    if raw is None or isinstance(raw, BackboneConfig):
        return raw
    return BackboneConfig(raw) if isinstance(raw, str) else BackboneConfig(**raw)
