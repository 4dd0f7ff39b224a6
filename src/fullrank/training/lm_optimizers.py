"""Every optimizer by name, over the body and the head of a language model.

The body is the weight matrices inside the blocks; the head is everything else (embeddings, the
output layer, norms, biases). Each has its own learning rate with every optimizer, so that runs of
different ones compare.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fullrank import optim
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.optim.matrices import matrix_shape
from fullrank.training.lm_config import OptimizerSection

Groups = list[dict[str, Any]]
# GaLore's and LIFT's default.
_RANK = 128
# transformers' names of the output layer of a classifier.
_CLASSIFIERS = ("classifier", "score")
Build = Callable[[nn.Module, Groups, OptimizerSection], torch.optim.Optimizer]


class Recipe(NamedTuple):
    """How an optimizer is made, and what its section of a run may say.

    Attributes
    ----------
    kind
        Its class.
    build
        Makes it over the groups of a model.
    ranked
        Whether it has a rank.
    beside
        Options that are not the class's own.
    """

    kind: Any
    build: Build
    ranked: bool = False
    beside: frozenset[str] = frozenset()

    @property
    def options(self) -> set[str]:
        """Names of the options that it takes."""
        return {*inspect.signature(self.kind).parameters, *_grouped(self.kind), *self.beside}

    def has_rank(self, options: Mapping[str, Any]) -> bool:
        """Whether it has a rank with these options."""
        # Whole tensors, FRUGAL's default, are chosen by density.
        blocks = self.kind is optim.FrugalAdamW and options.get("subspace", "block") == "block"
        return self.ranked and not blocks


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Return the optimizer that a run's section names, over what is trainable in the model.

    Raises
    ------
    InputError
        When there is none of that name, it does not take one of the options, or has no rank.

    Examples
    --------
    >>> model = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    >>> section = OptimizerSection(name="galore_adamw", lr=0.01, head_lr=0.001, rank=2)
    >>> [(g["lr"], g["rank"]) for g in make_optimizer(model, section).param_groups]
    [(0.01, [2]), (0.001, None)]
    """
    recipe = _recipe(section.name)
    if section.rank is not None and not recipe.ranked:
        ranked = ", ".join(name for name, other in _RECIPES.items() if other.ranked)
        raise InputError(
            f"{section.name} has no rank; remove optimizer.rank, or pass optimizer.rank=null. "
            f"Those with one are {ranked}"
        )
    if unknown := sorted(set(section.options) - recipe.options):
        raise InputError(
            f"{section.name} takes no {', '.join(unknown)}; remove that from optimizer.options, "
            "or pass optimizer.options={}"
        )
    try:
        return recipe.build(model, body_and_head(model, section), section)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer.options of {section.name}: {error}") from error


def optimizer_names() -> list[str]:
    """Return the names that :func:`make_optimizer` knows.

    >>> "muon" in optimizer_names()
    True
    """
    return sorted(_RECIPES)


def foreign_settings(name: str, section: Mapping[str, Any]) -> list[str]:
    """Return which of a section's settings an optimizer does not take: a rank, options.

    >>> foreign_settings("adamw", {"lr": 0.1, "rank": 4, "options": {"scale": 1.0, "eps": 1e-6}})
    ['rank', 'options.scale']
    """
    recipe, options = _recipe(name), section.get("options") or {}
    ranked = section.get("rank") is None or recipe.has_rank(options)
    return [
        *([] if ranked else ["rank"]),
        *(f"options.{option}" for option in options if option not in recipe.options),
    ]


def _recipe(name: str) -> Recipe:
    recipe = _RECIPES.get(name)
    if recipe is None:
        raise InputError(f"no optimizer {name!r}; there are {', '.join(optimizer_names())}")
    return recipe


def body_and_head(model: nn.Module, section: OptimizerSection) -> Groups:
    """Sort trainable parameters into weight matrices of the blocks, and all others.

    An adapter's matrices are of the body; a classifier's output layer is of the head.
    """
    body = {id(p) for p in _matrices(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    head_lr = section.lr if section.head_lr is None else section.head_lr
    found = [
        {
            "params": [p for p in trained if id(p) in body],
            "lr": section.lr,
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p in trained if id(p) not in body], "lr": head_lr, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    head = {id(p) for name in _CLASSIFIERS for p in _parts(model, name)}
    try:
        matrices = list(optim.frugal_param_groups(model)[0]["params"])
    except InputError:  # no linear layer is trained: an adapter without one, or nothing at all
        matrices = []
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            # PEFT's copies of whole layers are what these layers are.
            held = None if name == "modules_to_save" else getattr(module, name, None)
            if isinstance(held, nn.Module):
                matrices += [p for p in held.parameters() if p.requires_grad and p.ndim >= 2]
    yield from (p for p in matrices if id(p) not in head)


def _parts(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Parameters of a module directly inside the model, whatever wraps that."""
    for full, parameter in model.named_parameters():
        if canonical_name(full).partition(".")[0] == name:
            yield parameter


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each over parameters of its own.

    Examples
    --------
    >>> a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    >>> both = Together(torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.2))
    >>> [group["lr"] for group in both.param_groups]
    [0.1, 0.2]
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([g for part in parts for g in part.param_groups], {})
        self.parts = parts
        # The very groups of the parts: what a schedule writes there is what they read.
        self.param_groups = [g for part in parts for g in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Step each."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        for part in self.parts:
            self.state.update(part.state)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states."""
        return {
            "parts": [part.state_dict() for part in self.parts],
            "state": {},
            "param_groups": [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


def _plain(kind: Callable[..., torch.optim.Optimizer], **fixed: Any) -> Recipe:
    def build(_: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
        return kind(groups, **{**fixed, **section.options})

    return Recipe(kind, build)


def _muon(_: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
    """Muon on the body's matrices, AdamW on the head, as its authors do."""
    matrices = [g for g in groups if all(p.ndim == 2 for p in g["params"])][:1]
    rest = [g for g in groups if g not in matrices]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, **section.options))
    if rest:
        parts.append(torch.optim.AdamW(rest, fused=True))
    return Together(*parts)


def _projected(kind: Any, **fixed: Any) -> Recipe:
    """An optimizer with a rank: the body's group has it, and the options that a group may have."""

    def build(_: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
        whole, own = _sorted_options(kind, section.options)
        rank = section.rank or _RANK
        body, *rest = groups
        # No matrix has more; one that narrow is then stepped whole. LIFT's masks are of matrices.
        masks = kind is optim.LIFT
        own["rank"] = [
            None if masks and p.ndim != 2 else min(rank, *matrix_shape(p.shape))
            for p in body["params"]
        ]
        if masks:
            own.setdefault("lra_rank", own["rank"])
        return kind([{**body, **own}, *rest], **{**fixed, **whole})  # type: ignore[no-any-return]

    return Recipe(kind, build, ranked=True)


def _frugal(_: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
    whole, own = _sorted_options(optim.FrugalAdamW, section.options)
    body, *rest = groups
    if section.rank is not None:
        own["rank"] = section.rank
    return optim.FrugalAdamW([{**body, "is_proj_params": True, **own}, *rest], **whole)


def _mkor(kind: Any) -> Recipe:
    """MKOR before momentum SGD; the output head over a vocabulary is left out."""

    def build(model: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
        if "grad_scale" in section.options:
            raise InputError("optimizer.options.grad_scale: the loop tells what is on its loss")
        options = {"exclude": _heads(model), **section.options}
        momentum = options.pop("momentum", 0.9)
        inner = functools.partial(torch.optim.SGD, momentum=momentum)
        return kind(model, inner(groups), **options)  # type: ignore[no-any-return]

    # MKORH passes on what it does not know.
    passed_on = inspect.signature(optim.MKOR).parameters
    return Recipe(kind, build, beside=frozenset({"momentum", *passed_on}))


def _lora_pro(model: nn.Module, groups: Groups, section: OptimizerSection) -> torch.optim.Optimizer:
    """LoRA-Pro on the pairs; what is trained beside them is sorted as with the others."""
    made = optim.LoRAPro(model, lr=section.lr, weight_decay=section.weight_decay, **section.options)
    _, *others = made.param_groups
    del made.param_groups[1:]
    for group in groups:
        held = {id(p) for p in group["params"]}
        named = [
            (name, param)
            for other in others
            for name, param in zip(other["param_names"], other["params"], strict=True)
            if id(param) in held
        ]
        if named:
            made.add_param_group({**group, "params": named})
    return made


def _heads(model: nn.Module) -> list[nn.Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [output] if isinstance(output, nn.Module) else []


def _grouped(kind: Any) -> set[str]:
    """What each group of an optimizer may have of its own."""
    return set(getattr(kind, "checks", {}))


def _sorted_options(kind: Any, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the whole optimizer, and those of the body's group."""
    grouped = _grouped(kind)
    own = {name: value for name, value in options.items() if name in grouped}
    return {name: value for name, value in options.items() if name not in grouped}, own


_RECIPES: dict[str, Recipe] = {
    "adamw": _plain(torch.optim.AdamW, fused=True),
    "sgd": _plain(torch.optim.SGD, momentum=0.9),
    "muon": Recipe(torch.optim.Muon, _muon),
    "galore_adamw": _projected(optim.GaLoreAdamW),
    "galore_adafactor": _projected(
        optim.GaLoreAdafactor, lr=1e-3, relative_step=False, scale_parameter=False
    ),
    "fira_adamw": _projected(optim.FiraAdamW),
    "fira_rmsprop": _projected(optim.FiraRMSprop),
    "frugal_adamw": Recipe(optim.FrugalAdamW, _frugal, ranked=True),
    "gradnormlorp_adamw": _projected(optim.GradNormLoRPAdamW),
    "lift": _projected(optim.LIFT),
    "adamp": _plain(optim.AdamP),
    "sgdp": _plain(optim.SGDP, lr=1e-3, momentum=0.9),
    "mkor": _mkor(optim.MKOR),
    "mkorh": _mkor(optim.MKORH),
    "lora_pro": Recipe(optim.LoRAPro, _lora_pro),
}
