"""Shrink: factorised layers, the methods that make them, and the search for the smallest plan."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.compress.allocation import Budget as Budget
    from fullrank.compress.allocation import allocate as allocate
    from fullrank.compress.batches import Batches as Batches
    from fullrank.compress.calibration import CalibrationStats as CalibrationStats
    from fullrank.compress.calibration import LayerStats as LayerStats
    from fullrank.compress.conv_split import split_conv as split_conv
    from fullrank.compress.curve import Candidate as Candidate
    from fullrank.compress.curve import FloorError as FloorError
    from fullrank.compress.curve import Shrunk as Shrunk
    from fullrank.compress.distill import Distillation as Distillation
    from fullrank.compress.factorization import factorize as factorize
    from fullrank.compress.family import PlanFamily as PlanFamily
    from fullrank.compress.family_training import TrainedFamily as TrainedFamily
    from fullrank.compress.family_weights import WeightFamily as WeightFamily
    from fullrank.compress.floor import shrink as shrink
    from fullrank.compress.greenformers import greenformers as greenformers
    from fullrank.compress.greenformers import greenformers_plan as greenformers_plan
    from fullrank.compress.int8 import quantize_int8 as quantize_int8
    from fullrank.compress.int8 import quantize_onnx as quantize_onnx
    from fullrank.compress.layers import LowRankLinear as LowRankLinear
    from fullrank.compress.layers_conv import LowRankConv1d as LowRankConv1d
    from fullrank.compress.layers_conv import LowRankConv2d as LowRankConv2d
    from fullrank.compress.layers_conv import LowRankConv3d as LowRankConv3d
    from fullrank.compress.lord import LoRDConfig as LoRDConfig
    from fullrank.compress.lord import lord_compress as lord_compress
    from fullrank.compress.maestro import Maestro as Maestro
    from fullrank.compress.matrices import Matricised as Matricised
    from fullrank.compress.matrices import matricise as matricise
    from fullrank.compress.measured_speed import faster_only as faster_only
    from fullrank.compress.page import write_page as write_page
    from fullrank.compress.pela import pela_compress as pela_compress
    from fullrank.compress.pela import pela_plan as pela_plan
    from fullrank.compress.pela_loss import PELALoss as PELALoss
    from fullrank.compress.pela_recovery import PELARecovery as PELARecovery
    from fullrank.compress.planning import layer_spectra as layer_spectra
    from fullrank.compress.planning import make_plan as make_plan
    from fullrank.compress.report import report as report
    from fullrank.compress.rules_threshold import ImportanceThreshold as ImportanceThreshold
    from fullrank.compress.rules_threshold import NormalisedThreshold as NormalisedThreshold
    from fullrank.compress.rules_threshold import solve_for_reduction as solve_for_reduction
    from fullrank.compress.search_record import SearchRecord as SearchRecord
    from fullrank.compress.semi_nmf import semi_nmf as semi_nmf
    from fullrank.compress.solvers import Decomposition as Decomposition
    from fullrank.compress.solvers import Factors as Factors
    from fullrank.compress.solvers import decompose as decompose
    from fullrank.compress.solvers import split as split
    from fullrank.compress.store import export_dense as export_dense
    from fullrank.compress.store import load as load
    from fullrank.compress.store import save as save
    from fullrank.compress.targets import factorisable as factorisable
    from fullrank.compress.trp import TRP as TRP
    from fullrank.compress.welore import WeLoreConfig as WeLoreConfig
    from fullrank.compress.welore import WeLoreReport as WeLoreReport
    from fullrank.compress.welore import mark_trainable as mark_trainable
    from fullrank.compress.welore import welore_compress as welore_compress
    from fullrank.compress.welore import welore_plan as welore_plan
    from fullrank.core.plan import RankPlan as RankPlan
    from fullrank.core.rank_rules import Energy as Energy
    from fullrank.core.rank_rules import Fixed as Fixed
    from fullrank.core.rank_rules import FractionOfBreakEven as FractionOfBreakEven
    from fullrank.core.rank_rules import ParamRatio as ParamRatio
    from fullrank.core.rank_rules import PerKind as PerKind
    from fullrank.core.rank_rules import Value as Value

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Budget", "allocate"], "allocation"),
        "Batches": "batches",
        **dict.fromkeys(["CalibrationStats", "LayerStats"], "calibration"),
        "Distillation": "distill",
        "shrink": "floor",
        "factorisable": "targets",
        "PlanFamily": "family",
        "TrainedFamily": "family_training",
        "WeightFamily": "family_weights",
        "factorize": "factorization",
        **dict.fromkeys(["greenformers", "greenformers_plan"], "greenformers"),
        "report": "report",
        "write_page": "page",
        **dict.fromkeys(["quantize_int8", "quantize_onnx"], "int8"),
        "SearchRecord": "search_record",
        "LowRankLinear": "layers",
        **dict.fromkeys(["LoRDConfig", "lord_compress"], "lord"),
        "Maestro": "maestro",
        **dict.fromkeys(["Matricised", "matricise"], "matrices"),
        "faster_only": "measured_speed",
        "pela_compress": "pela",
        "PELALoss": "pela_loss",
        "PELARecovery": "pela_recovery",
        "PELATrainer": "pela_trainer",
        "MaestroTrainer": "maestro_trainer",
        "TRPCallback": "trp_callback",
        "pela_plan": "pela",
        "split_conv": "conv_split",
        **dict.fromkeys(["LowRankConv1d", "LowRankConv2d", "LowRankConv3d"], "layers_conv"),
        "TRP": "trp",
        **dict.fromkeys(["layer_spectra", "make_plan"], "planning"),
        **dict.fromkeys(["Candidate", "FloorError", "Shrunk"], "curve"),
        **dict.fromkeys(["Decomposition", "Factors", "decompose", "split"], "solvers"),
        "semi_nmf": "semi_nmf",
        **dict.fromkeys(
            ["ImportanceThreshold", "NormalisedThreshold", "solve_for_reduction"],
            "rules_threshold",
        ),
        **dict.fromkeys(
            ["WeLoreConfig", "WeLoreReport", "mark_trainable", "welore_compress", "welore_plan"],
            "welore",
        ),
        **dict.fromkeys(["export_dense", "load", "save"], "store"),
        **dict.fromkeys(
            [
                "Energy",
                "Fixed",
                "FractionOfBreakEven",
                "ParamRatio",
                "PerKind",
                "RankPlan",
                "Value",
            ],
            "rules",
        ),
    },
)
