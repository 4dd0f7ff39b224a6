"""BEER: a critic's consecutive features are no more alike than the Bellman equation allows.

A critic ``Q(s, a) = w . phi(s, a) + b`` that satisfies its Bellman equation has
``(phi - gamma phi')^T w = r``, so by Cauchy and Schwarz the cosine of ``phi`` and ``phi'`` cannot
exceed a bound (arXiv 2404.12754). A hinge on the difference raises the rank of collapsing
features, and does nothing once the equation holds: the rank adapts to the task.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.core.errors import InputError

Reduction = Literal["mean", "sum", "none"]

# Below this a squared weight norm would make the bound meaninglessly low everywhere.
_LEAST_SQUARED_WEIGHT = 1e-8
# Norm of a feature vector that is taken for zero.
_DEAD = 1e-6
# The official code has this in the bound, whatever the agent's discount is.
_OFFICIAL_GAMMA = 0.99


@torch.no_grad()
def bellman_cosine_bound(
    phi: Tensor,
    phi_next: Tensor,
    reward: Tensor,
    w: Tensor,
    gamma: float,
    bias: Tensor | float | None = None,
    n_step: int = 1,
    eps: float = _DEAD,
    *,
    phi_next_norm: Tensor | None = None,
    lowest: float | None = -1.0,
    discount: Tensor | None = None,
) -> Tensor:
    """Largest cosine of ``phi`` and ``phi_next`` that the Bellman equation allows.

    ``(|phi|^2 + gamma^2 |phi'|^2 - r^2 / |w|^2) / (2 gamma |phi| |phi'|)``.

    Parameters
    ----------
    phi, phi_next
        ``(B, d)`` penultimate features of ``(s, a)`` and of ``(s', a')``. Half precision is
        worked on in float32.
    reward
        ``(B,)`` or ``(B, 1)``; over ``n_step`` steps their discounted sum.
    w
        ``(d,)`` or ``(1, d)`` weight of the critic's last layer.
    gamma
        Discount of the agent, in (0, 1].
    bias
        Of the last layer: the equation is then one of ``r - (1 - gamma) b``.
    n_step
        Steps between the two states; ``gamma`` is raised to it.
    eps
        Least norm of a feature vector: dead ones have no direction.
    phi_next_norm
        ``(B,)`` norms to take for ``|phi'|`` in the numerator, for the official code's mixture
        of two networks.
    lowest
        The bound is no lower than this; no cosine is below -1. None leaves it.
    discount
        ``(B,)`` or ``(B, 1)`` what the next state counts with, where rows differ in how many steps
        it is away; ``gamma ** n_step`` by default.

    Returns
    -------
    Tensor
        ``(B,)``, without a gradient.

    Raises
    ------
    InputError
        When shapes do not fit, or ``gamma`` or ``n_step`` is out of range.

    Examples
    --------
    >>> phi = torch.tensor([[3.0, 4.0]])
    >>> bellman_cosine_bound(phi, phi, torch.zeros(1), torch.tensor([1.0, 0.0]), 1.0)
    tensor([1.])
    >>> bellman_cosine_bound(phi, phi, torch.full((1,), 5.0), torch.tensor([1.0, 0.0]), 1.0)
    tensor([0.5000])
    """
    if not 0 < gamma <= 1 or n_step < 1:
        raise InputError(f"gamma={gamma}, n_step={n_step}; expected a discount in (0, 1] and >= 1")
    phi, phi_next, reward, w = _checked(phi, phi_next, reward, w)
    factor = gamma**n_step if discount is None else _column(discount, len(phi), "discount").to(phi)
    if bias is not None:
        reward = reward - (1 - factor) * torch.as_tensor(bias).to(reward).reshape(())
    here = phi.norm(dim=1).clamp_min(eps)
    there = phi_next.norm(dim=1).clamp_min(eps)
    squared = there if phi_next_norm is None else phi_next_norm
    surprise = reward.square() / w.square().sum().clamp_min(_LEAST_SQUARED_WEIGHT)
    numerator = here.square() + (factor * squared).square() - surprise
    bound: Tensor = numerator / (2 * factor * here * there)
    return bound if lowest is None else bound.clamp_min(lowest)


def beer_loss(
    phi: Tensor,
    phi_next: Tensor,
    reward: Tensor,
    w: Tensor,
    gamma: float,
    done: Tensor | None = None,
    bias: Tensor | float | None = None,
    next_features_for_bound: Tensor | None = None,
    reduction: Reduction = "mean",
    mask_terminal: bool = True,
    n_step: int = 1,
    discount: Tensor | None = None,
) -> Tensor:
    """How far cosines of consecutive features exceed their bound; not yet times ``beta``.

    The gradient goes through ``phi`` in the cosine only, and is orthogonal to it: directions
    change, norms do not.

    Parameters
    ----------
    phi
        ``(B, d)`` penultimate features of the online critic.
    phi_next
        ``(B, d)`` of the target critic at the target policy's action; no gradient flows there.
    reward, w, gamma, bias, n_step, discount
        See :func:`bellman_cosine_bound`.
    done
        ``(B,)`` or ``(B, 1)``: where the episode ended. Those rows have no next state.
    next_features_for_bound
        ``(B, d)`` features whose norms stand in the bound's numerator, and then the bound may
        lie below -1: as in the official code. None takes ``phi_next`` everywhere.
    reduction
        ``"mean"`` (over all rows of the batch), ``"sum"`` or ``"none"``.
    mask_terminal
        False counts rows that ended, as the official code does.

    Returns
    -------
    Tensor
        A scalar, or ``(B,)``.

    Examples
    --------
    >>> phi = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> loss = beer_loss(phi, torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]),
    ...                  torch.tensor([1.0, 0.0]), gamma=1.0)
    >>> bool(loss > 0 or loss == 0)
    True
    """
    ended = done if mask_terminal else None
    numerator = next_features_for_bound
    excess, _ = _violation(
        phi, phi_next, reward, w, gamma, bias, numerator, n_step, ended, discount
    )
    if reduction == "none":
        return excess
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction={reduction!r}; it is 'mean', 'sum' or 'none'")
    return excess.mean() if reduction == "mean" else excess.sum()


class BEERRegularizer(nn.Module):
    """The term to add to a critic's loss.

    For twin critics call it once for each and take the mean.

    Parameters
    ----------
    beta
        Weight of the term; 1e-3 in the paper's experiments.
    gamma
        Discount of the agent.
    official
        Compute what the official code does: 0.99 in the bound whatever ``gamma`` is, the online
        features' norms in its numerator (pass ``next_features_for_bound``), no bias, rows that
        ended are counted.

    Attributes
    ----------
    last_stats
        Of the last batch, as tensors without a gradient: ``violating`` (share of rows),
        ``violation`` (mean excess), ``cosine`` (mean) and ``weight_norm``.

    Raises
    ------
    InputError
        When ``beta`` is negative or not finite, or ``gamma`` not in (0, 1].

    Examples
    --------
    >>> critic, head = nn.Sequential(nn.Linear(3, 8), nn.ReLU()), nn.Linear(8, 1)
    >>> beer = BEERRegularizer(beta=1e-3, gamma=0.99)
    >>> here, there = critic(torch.ones(4, 3)), critic(torch.zeros(4, 3)).detach()
    >>> term = beer(here, there, torch.ones(4), head.weight, bias=head.bias)
    >>> term.shape, sorted(beer.last_stats)
    (torch.Size([]), ['cosine', 'violating', 'violation', 'weight_norm'])
    """

    def __init__(self, beta: float = 1e-3, gamma: float = 0.99, official: bool = False) -> None:
        super().__init__()
        if not 0 <= beta < math.inf or not 0 < gamma <= 1:
            raise InputError(f"beta={beta}, gamma={gamma}; expected beta >= 0 and 0 < gamma <= 1")
        self.beta = beta
        self.gamma = _OFFICIAL_GAMMA if official else gamma
        self.official = official
        self.last_stats: dict[str, Tensor] = {}

    def forward(
        self,
        phi: Tensor,
        phi_next: Tensor,
        reward: Tensor,
        w: Tensor,
        done: Tensor | None = None,
        bias: Tensor | float | None = None,
        next_features_for_bound: Tensor | None = None,
        n_step: int = 1,
        discount: Tensor | None = None,
    ) -> Tensor:
        """Return ``beta`` times the loss; arguments as for :func:`beer_loss`."""
        if self.official and next_features_for_bound is None:
            raise InputError(
                "official=True takes the bound's numerator from the online critic: pass its "
                "features of the next state as next_features_for_bound="
            )
        numerator = next_features_for_bound if self.official else None
        fixed, ended = (None, None) if self.official else (bias, done)
        excess, cosine = _violation(
            phi, phi_next, reward, w, self.gamma, fixed, numerator, n_step, ended, discount
        )
        self.last_stats = {
            "violating": (excess.detach() > 0).to(excess).mean(),
            "violation": excess.detach().mean(),
            "cosine": cosine.detach().mean(),
            "weight_norm": torch.as_tensor(w).detach().norm(),
        }
        return self.beta * excess.mean()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"beta={self.beta}, gamma={self.gamma}, official={self.official}"


def _violation(
    phi: Tensor,
    phi_next: Tensor,
    reward: Tensor,
    w: Tensor,
    gamma: float,
    bias: Tensor | float | None,
    numerator: Tensor | None,
    n_step: int,
    done: Tensor | None,
    discount: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Excess of each row's cosine over its bound, and the cosine; 0 in rows that ended."""
    phi, phi_next, reward, w = _checked(phi, phi_next, reward, w)
    phi_next, w = phi_next.detach(), w.detach()
    going = torch.ones_like(reward)
    if done is not None:
        going = 1 - _column(torch.as_tensor(done, device=phi.device), len(phi), "done").to(reward)
    # Whatever stands for the next state of an episode that ended is no state.
    goes_on = (going > 0)[:, None]
    phi_next = torch.where(goes_on, phi_next, 1.0)
    mixed = numerator is not None
    bound = bellman_cosine_bound(
        phi,
        phi_next,
        reward,
        w,
        gamma,
        bias,
        n_step,
        phi_next_norm=None if numerator is None else numerator.detach().to(phi).norm(dim=1),
        lowest=None if mixed else -1.0,
        discount=discount,
    )
    # A feature vector that is zero has no direction, and must not get an infinite gradient.
    alive = ((phi.norm(dim=1) > _DEAD) & (phi_next.norm(dim=1) > _DEAD)).detach()
    cosine = functional.cosine_similarity(
        torch.where(alive[:, None], phi, torch.ones_like(phi)), phi_next, dim=1
    )
    weight = alive * going
    excess = torch.where(goes_on[:, 0], functional.relu(cosine - bound), 0.0)
    return excess * weight, cosine * weight


def _checked(
    phi: Tensor, phi_next: Tensor, reward: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features ``(B, d)``, reward ``(B,)`` and weight ``(d,)`` in at least float32.

    Arrays will do.
    """
    phi, phi_next, reward, w = (torch.as_tensor(x) for x in (phi, phi_next, reward, w))
    if phi.ndim != 2 or phi.shape != phi_next.shape or 0 in phi.shape:
        raise InputError(
            f"features of shapes {tuple(phi.shape)} and {tuple(phi_next.shape)}; expected two "
            "of (batch, width)"
        )
    if w.numel() != phi.shape[1]:
        raise InputError(
            f"a last weight of shape {tuple(w.shape)} for features of width {phi.shape[1]}; "
            "expected one number a feature"
        )
    dtype = torch.promote_types(phi.dtype, torch.float32)
    reward = _column(reward, len(phi), "reward")
    return phi.to(dtype), phi_next.to(dtype), reward.to(dtype), w.reshape(-1).to(dtype)


def _column(values: Tensor, rows: int, name: str) -> Tensor:
    if values.numel() != rows:
        raise InputError(f"{name} of shape {tuple(values.shape)} for {rows} rows; one each")
    return values.reshape(-1)
