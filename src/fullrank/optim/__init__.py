"""Train in less memory: optimizers whose state lives in a subspace of each gradient."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.optim.adamp import SGDP as SGDP
    from fullrank.optim.adamp import AdamP as AdamP
    from fullrank.optim.base import SubspaceOptimizer as SubspaceOptimizer
    from fullrank.optim.coordinates import Coordinates as Coordinates
    from fullrank.optim.distributed_checkpoint import allocate_as_saved as allocate_as_saved
    from fullrank.optim.fira import FiraAdamW as FiraAdamW
    from fullrank.optim.fira import FiraRMSprop as FiraRMSprop
    from fullrank.optim.foundation import FullrankOptimizer as FullrankOptimizer
    from fullrank.optim.frugal import FrugalAdamW as FrugalAdamW
    from fullrank.optim.galore import GaLoreAdafactor as GaLoreAdafactor
    from fullrank.optim.galore import GaLoreAdamW as GaLoreAdamW
    from fullrank.optim.gradient_plan import gradient_plan as gradient_plan
    from fullrank.optim.gradnormlorp import GradNormLoRPAdamW as GradNormLoRPAdamW
    from fullrank.optim.groups import ParamGroups as ParamGroups
    from fullrank.optim.groups import frugal_param_groups as frugal_param_groups
    from fullrank.optim.groups import galore_param_groups as galore_param_groups
    from fullrank.optim.groups import param_groups as param_groups
    from fullrank.optim.iterative import IterativeSubspace as IterativeSubspace
    from fullrank.optim.lift import LIFT as LIFT
    from fullrank.optim.lift_tools import apply_delta as apply_delta
    from fullrank.optim.lift_tools import export_delta as export_delta
    from fullrank.optim.lift_tools import lift_mask_fn as lift_mask_fn
    from fullrank.optim.lift_tools import lift_param_groups as lift_param_groups
    from fullrank.optim.lora_adjust import adjust_lora_grads as adjust_lora_grads
    from fullrank.optim.lora_pro import LoRAPro as LoRAPro
    from fullrank.optim.lora_pro import create_lorapro_optimizer as create_lorapro_optimizer
    from fullrank.optim.mask import PrincipalMask as PrincipalMask
    from fullrank.optim.mask import principal_mask as principal_mask
    from fullrank.optim.memory import memory_table as memory_table
    from fullrank.optim.memory import state_bytes as state_bytes
    from fullrank.optim.mkor import MKOR as MKOR
    from fullrank.optim.mkor_factors import sm_update as sm_update
    from fullrank.optim.mkor_hybrid import MKORH as MKORH
    from fullrank.optim.per_layer import PerLayer as PerLayer
    from fullrank.optim.per_layer import step_per_layer as step_per_layer
    from fullrank.optim.radial import project_radial as project_radial
    from fullrank.optim.random_basis import RandomSubspace as RandomSubspace
    from fullrank.optim.row_norm import weight_norm_gradients as weight_norm_gradients
    from fullrank.optim.subspace import Projection as Projection
    from fullrank.optim.subspace import Subspace as Subspace
    from fullrank.optim.subspace import SVDSubspace as SVDSubspace
    from fullrank.optim.whole import Identity as Identity
    from fullrank.optim.whole import Nothing as Nothing

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SubspaceOptimizer": "base",
        "FullrankOptimizer": "foundation",
        "allocate_as_saved": "distributed_checkpoint",
        "gradient_plan": "gradient_plan",
        **dict.fromkeys(
            ["ParamGroups", "frugal_param_groups", "galore_param_groups", "param_groups"], "groups"
        ),
        **dict.fromkeys(["memory_table", "state_bytes"], "memory"),
        **dict.fromkeys(["GaLoreAdafactor", "GaLoreAdamW"], "galore"),
        "IterativeSubspace": "iterative",
        **dict.fromkeys(["Identity", "Nothing"], "whole"),
        "Coordinates": "coordinates",
        "RandomSubspace": "random_basis",
        **dict.fromkeys(["FiraAdamW", "FiraRMSprop"], "fira"),
        "FrugalAdamW": "frugal",
        "GradNormLoRPAdamW": "gradnormlorp",
        "weight_norm_gradients": "row_norm",
        **dict.fromkeys(["AdamP", "SGDP"], "adamp"),
        "LIFT": "lift",
        **dict.fromkeys(
            ["apply_delta", "export_delta", "lift_mask_fn", "lift_param_groups"], "lift_tools"
        ),
        **dict.fromkeys(["principal_mask", "PrincipalMask"], "mask"),
        "project_radial": "radial",
        **dict.fromkeys(["LoRAPro", "create_lorapro_optimizer"], "lora_pro"),
        "adjust_lora_grads": "lora_adjust",
        "MKOR": "mkor",
        "MKORH": "mkor_hybrid",
        "sm_update": "mkor_factors",
        **dict.fromkeys(["PerLayer", "step_per_layer"], "per_layer"),
        **dict.fromkeys(["Projection", "Subspace", "SVDSubspace"], "subspace"),
    },
)
