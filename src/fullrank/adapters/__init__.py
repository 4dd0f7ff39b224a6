"""Train a little: adapters as citizens of PEFT."""

from typing import TYPE_CHECKING

from fullrank._after_import import after_import
from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.adapters import eva as eva
    from fullrank.adapters import lora_ga as lora_ga
    from fullrank.adapters import lora_sb as lora_sb
    from fullrank.adapters.adapt import AdaptReport as AdaptReport
    from fullrank.adapters.adapt import adapt as adapt
    from fullrank.adapters.eva_report import EvaReport as EvaReport
    from fullrank.adapters.export import check_base as check_base
    from fullrank.adapters.export import save_as_lora as save_as_lora
    from fullrank.adapters.export import to_lora as to_lora
    from fullrank.adapters.flylora import FlyLoraConfig as FlyLoraConfig
    from fullrank.adapters.hydra import HydraConfig as HydraConfig
    from fullrank.adapters.lora_files import LowRank as LowRank
    from fullrank.adapters.lora_files import write_lora as write_lora
    from fullrank.adapters.lora_ga import LoraGAReport as LoraGAReport
    from fullrank.adapters.lora_reading import inspect as inspect
    from fullrank.adapters.lora_reading import read_lora as read_lora
    from fullrank.adapters.lora_sb import LoraSBConfig as LoraSBConfig
    from fullrank.adapters.lora_sb import LoraSBReport as LoraSBReport
    from fullrank.adapters.merging import MergeReport as MergeReport
    from fullrank.adapters.merging import merge_adapters as merge_adapters
    from fullrank.adapters.merging import merge_updates as merge_updates
    from fullrank.adapters.randlora import RandLoraConfig as RandLoraConfig

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "eva": "",
        "lora_ga": "",
        "lora_sb": "",
        **dict.fromkeys(["AdaptReport", "adapt"], "adapt"),
        "EvaReport": "eva_report",
        **dict.fromkeys(["check_base", "save_as_lora", "to_lora"], "export"),
        **dict.fromkeys(["inspect", "read_lora"], "lora_reading"),
        **dict.fromkeys(["LowRank", "write_lora"], "lora_files"),
        "LoraGAReport": "lora_ga",
        **dict.fromkeys(["LoraSBConfig", "LoraSBReport"], "lora_sb"),
        **dict.fromkeys(["MergeReport", "merge_adapters", "merge_updates"], "merging"),
        "FlyLoraConfig": "flylora",
        "HydraConfig": "hydra",
        "RandLoraConfig": "randlora",
    },
)


def _register_with_peft() -> None:
    from fullrank.adapters import lora_factorised as lora_factorised


# PEFT then puts LoRA on factorised layers too.
after_import("peft.tuners.lora", _register_with_peft)
