"""`DemoConfig`: what the demo does, and how much of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError
from fullrank.core.models import DEFAULT_ENCODER

METRICS = ("nDCG@10", "AP", "RR", "R@100")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Parameters
    ----------
    out
        Folder to write; a demo that is there is replaced.
    cache
        Where embeddings and weights are kept for the next run; None for a folder beside ``out``.
    encoder
        The model to start from.
    every, size
        The corpus: every installed package or the default ones, cut to about so many documents;
        None takes them all.
    quick
        A few hundred documents and a handful of steps: to see that it works, not how well.
    tokens
        Documents are cut to so many tokens wherever they are encoded.
    seconds, max_steps
        Time box of training, and its steps at most; None for no limit.
    floor
        Share of the tuned encoder's nDCG@10 that the shrunk one has to keep.
    candidates, recovery_steps
        Of the search for it: plans measured, and fine-tuning steps of each.
    calibration, recovery
        Texts that say how the layers are used, and texts to fine-tune candidates on.
    uniform
        Shares at which uniform one-shot factorisation is measured beside it, for the curve.
    seed
        Of everything.
    """

    out: Path = Path("fullrank-demo")
    cache: Path | None = None
    encoder: str = DEFAULT_ENCODER
    every: bool = False
    size: int | None = 3500
    quick: bool = False
    tokens: int = 96
    seconds: float | None = 150.0
    max_steps: int | None = None
    floor: float = 0.97
    candidates: int = 2
    recovery_steps: int = 112
    recovery: int = 2000
    calibration: int = 320
    uniform: tuple[float, ...] = field(default=(0.9, 0.75))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise InputError(f"the floor is {self.floor}; it is a share in (0, 1), e.g. 0.97")
        if self.tokens < 8 or (self.size is not None and self.size < 50):
            raise InputError(f"tokens={self.tokens}, size={self.size}: at least 8 and 50")

    @classmethod
    def small(cls, out: Path, **changes: Any) -> DemoConfig:
        """Return the settings of ``--quick``."""
        settings: dict[str, Any] = {
            "quick": True,
            "tokens": 48,
            "seconds": None,
            "max_steps": 6,
            "candidates": 2,
            "recovery_steps": 4,
            "calibration": 96,
            "recovery": 128,
            "uniform": (0.6,),
            # So few queries cannot decide a floor near 1.
            "floor": 0.8,
        }
        return cls(out=out, **{**settings, **changes})

    @property
    def cache_folder(self) -> Path:
        """Where embeddings and weights are kept."""
        return self.cache or self.out.parent / ".fullrank-cache"

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = asdict(self)
        return {**values, "out": str(self.out), "cache": str(self.cache_folder)}
