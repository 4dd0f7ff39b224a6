"""Train in less memory: optimizers whose state lives in a subspace of each gradient."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.optim.base import SubspaceOptimizer as SubspaceOptimizer
    from fullrank.optim.galore import GaLoreAdafactor as GaLoreAdafactor
    from fullrank.optim.galore import GaLoreAdamW as GaLoreAdamW
    from fullrank.optim.groups import ParamGroups as ParamGroups
    from fullrank.optim.groups import galore_param_groups as galore_param_groups
    from fullrank.optim.groups import param_groups as param_groups
    from fullrank.optim.iterative import IterativeSubspace as IterativeSubspace
    from fullrank.optim.memory import memory_table as memory_table
    from fullrank.optim.memory import state_bytes as state_bytes
    from fullrank.optim.subspace import Identity as Identity
    from fullrank.optim.subspace import Projection as Projection
    from fullrank.optim.subspace import Subspace as Subspace
    from fullrank.optim.subspace import SVDSubspace as SVDSubspace

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SubspaceOptimizer": "base",
        **dict.fromkeys(["ParamGroups", "galore_param_groups", "param_groups"], "groups"),
        **dict.fromkeys(["memory_table", "state_bytes"], "memory"),
        **dict.fromkeys(["GaLoreAdafactor", "GaLoreAdamW"], "galore"),
        "IterativeSubspace": "iterative",
        **dict.fromkeys(["Identity", "Projection", "Subspace", "SVDSubspace"], "subspace"),
    },
)
