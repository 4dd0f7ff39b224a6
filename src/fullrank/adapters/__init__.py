"""Train a little: adapters as citizens of PEFT."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.adapters import eva as eva
    from fullrank.adapters import lora_ga as lora_ga
    from fullrank.adapters.eva import EvaReport as EvaReport
    from fullrank.adapters.lora_files import LowRank as LowRank
    from fullrank.adapters.lora_files import write_lora as write_lora
    from fullrank.adapters.lora_ga import LoraGAReport as LoraGAReport

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "eva": "",
        "lora_ga": "",
        "EvaReport": "eva",
        "LoraGAReport": "lora_ga",
        **dict.fromkeys(["LowRank", "write_lora"], "lora_files"),
    },
)
