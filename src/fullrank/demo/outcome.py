"""Everything a demo measured: what the report shows and `results.json` holds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fullrank._version import __version__
from fullrank.core.run import Run
from fullrank.core.table import Table

if TYPE_CHECKING:
    from fullrank.datasets import Dataset
    from fullrank.demo.config import DemoConfig
    from fullrank.demo.steps import Shrinking
    from fullrank.demo.systems import Settings
    from fullrank.evaluate import Comparison, Difference, FloorTest
    from fullrank.retrieval import Encoder
    from fullrank.spectra import XRay
    from fullrank.training import TrainedEncoder


@dataclass(frozen=True)
class Sizes:
    """What an encoder costs: numbers in it, bytes on disk, documents a second."""

    name: str
    dtype: str
    linear_parameters: int
    parameters: int
    disk_bytes: int
    documents_per_second: float

    @classmethod
    def of(cls, name: str, encoder: Encoder, disk_bytes: int, documents_per_second: float) -> Sizes:
        """Count its numbers."""
        from fullrank.compress.layers import LowRankLinear
        from fullrank.core.names import named_linears

        model = encoder.model
        dense = sum(m.weight.numel() for _, m in named_linears(model))  # type: ignore[operator,misc]
        factors = sum(
            m.first.numel() + m.second.numel()
            for m in model.modules()
            if isinstance(m, LowRankLinear)
        )
        return cls(
            name,
            encoder.dtype,
            dense + factors,
            sum(p.numel() for p in model.parameters()),
            disk_bytes,
            documents_per_second,
        )


def sizes_table(sizes: Sequence[Sizes]) -> Table:
    """Show encoders side by side."""
    return Table(
        ["encoder", "linear parameters", "all parameters", "MB on disk", "documents/s", "runs in"],
        [
            [
                s.name,
                s.linear_parameters,
                s.parameters,
                s.disk_bytes / 1e6,
                s.documents_per_second,
                s.dtype,
            ]
            for s in sizes
        ],
        title="Encoders",
        formats={
            "linear parameters": ",d",
            "all parameters": ",d",
            "MB on disk": ".1f",
            "documents/s": ".0f",
        },
    )


@dataclass(frozen=True)
class Outcome:
    """What :func:`~fullrank.demo.run_demo` found; see the fields' own types."""

    config: DemoConfig
    data: Dataset
    settings: Settings
    trained: TrainedEncoder
    before: XRay
    after: XRay
    shrinking: Shrinking
    floor: FloorTest
    decidable: float
    runs: Mapping[str, Run]
    comparison: Comparison
    sizes: Sequence[Sizes]
    latency: Table
    seconds: Mapping[str, float]
    peak_bytes: int
    from_cache: int

    def gain(self) -> Difference:
        """Return by how much the tuned encoder is better than the untuned one, on test."""
        from fullrank.evaluate import compare

        test = self.data.split("test")
        chosen = {name: self.runs[name] for name in ("dense (base)", "dense (tuned)")}
        compared = compare(
            chosen, test.qrels, ["nDCG@10"], clusters=test.clusters, seed=self.config.seed
        )
        found = compared.row("dense (tuned)").baseline
        assert found is not None
        return found

    def tables(self) -> list[Table]:
        """Return what the terminal shows at the end."""
        return [
            self.comparison.means(),
            self.comparison.table("nDCG@10"),
            self.trained.table(),
            self.shrinking.found.table(),
            sizes_table(self.sizes),
            self.latency,
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        found = self.shrinking.found
        return {
            "fullrank": __version__,
            "machine": machine(),
            "config": self.config.as_dict(),
            "corpus": dict(self.data.manifest),
            "settings": asdict(self.settings),
            "comparison": json.loads(self.comparison.to_json()),
            "gain": asdict(self.gain()),
            "training": self.trained.to_json(),
            "floor": {
                "asked": self.config.floor,
                "reference": found.reference,
                "curve": [
                    {
                        "kept": c.kept,
                        "linear_parameters": c.linear_parameters,
                        "parameters": c.parameters,
                        "ratio": c.ratio,
                        "lower": c.lower,
                        "holds": c.holds,
                    }
                    for c in found.curve
                ],
                "uniform": [asdict(p) for p in self.shrinking.uniform],
                "test": self.floor._asdict(),
                "decidable_on_dev": self.shrinking.decidable,
                "decidable_on_test": self.decidable,
            },
            "encoders": [asdict(s) for s in self.sizes],
            "latency": [dict(zip(self.latency.columns, r, strict=True)) for r in self.latency.rows],
            "seconds": dict(self.seconds),
            "peak_resident_bytes": self.peak_bytes,
            "from_cache": self.from_cache,
        }


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    import os

    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
