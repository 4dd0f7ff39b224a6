"""RandLoRA's arithmetic: a full-rank update from scaled random bases (arXiv 2502.00987).

With a and b the shorter and the longer side of the weight, N bases of rank r, fixed A (r x a) and
B_j (b x r), and trained Lambda (r x N) and Gamma (N x a)::

    D = s * sum over j of B_j diag(Lambda[:, j]) A diag(Gamma[j, :])          (b x a)

as one product: the bases side by side (b x R, R = r N >= a) times the scaled A (R x a).

Upstream lines A up by (k, j) and B by (j, k): its columns meet by position, which is another
update with the same distribution. Its checkpoints need that order (``"upstream"``).

What a step costs. As two thin products a token pays R (a + b) forward and as much backward: more
than twice the layer itself. Adding D to the weight costs a b R once, whatever the tokens; the
layer's own products then serve both, and one more, ``dy^T x``, gives the gradient. The function
below takes whichever is less, forward and backward each by itself.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Pairing = Literal["upstream", "paper"]


class Update(NamedTuple):
    """One adapter's numbers for one layer.

    Attributes
    ----------
    A, B
        The leading parts of the shared bases: ``(r, 1, a)`` and ``(b, R)``, the latter a view.
    lam, gam
        Lambda ``(r, N)`` and Gamma ``(N, a)``.
    scale
        s.
    tall
        Whether the weight ``(out, in)`` has out >= in, so that Gamma scales inputs.
    pairing
        ``"upstream"`` or ``"paper"``.
    """

    A: Tensor
    B: Tensor
    lam: Tensor
    gam: Tensor
    scale: float
    tall: bool
    pairing: Pairing


def update_of(
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    gam: Tensor,
    scale: float,
    shape: tuple[int, int],
    pairing: Pairing = "upstream",
) -> Update:
    """Cut the shared bases ``A (r, 1, width)``, ``B (length, N, r)`` to a layer ``(out, in)``."""
    out, into = shape
    a, b = min(shape), max(shape)
    # Bases are consecutive in a row of B: the first of them are a view, whatever B's length.
    flat = B.flatten(1)[:b, : lam.numel()]
    return Update(A[..., :a], flat, lam, gam, scale, out >= into, pairing)


def scaled_basis(u: Update) -> Tensor:
    """Return ``s diag(Lambda) A diag(Gamma)`` of all bases, one below the other: ``(R, a)``."""
    lam = u.scale * u.lam
    if u.pairing == "upstream":
        rows = (u.A.to(lam.dtype) * u.gam).mul_(lam.unsqueeze(-1))
    else:
        rows = (u.A.to(lam.dtype).transpose(0, 1) * u.gam.unsqueeze(1)).mul_(lam.T.unsqueeze(-1))
    return rows.flatten(0, 1)


def scale_gradients(g: Tensor, u: Update) -> tuple[Tensor, Tensor]:
    """Gradients of Lambda and Gamma from that of the scaled A, ``g (R, a)``, which is used up."""
    r, count = u.lam.shape
    g = g.view(r, count, -1) if u.pairing == "upstream" else g.view(count, r, -1).transpose(0, 1)
    g.mul_((u.scale * u.A).to(g.dtype))
    of_lam = (g * u.gam).sum(-1)
    return of_lam, g.mul_(u.lam.unsqueeze(-1)).sum(0)


def delta(u: Update, weight: Tensor | None = None) -> Tensor:
    """Return the update ``(out, in)``, added to a weight if there is one."""
    scaled = scaled_basis(u)
    B = u.B.to(scaled.dtype)
    left, right = (B, scaled) if u.tall else (scaled.T, B.T)
    return left @ right if weight is None else torch.addmm(weight, left, right)


class _Linear(torch.autograd.Function):
    """``y = x (W + D)^T + bias``, or ``x D^T`` where there is no W.

    Between forward and backward it keeps x, and W + D or the scaled A unless they are to be built
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lam: Tensor,
        gam: Tensor,
        A: Tensor,
        B: Tensor,
        how: tuple[float, bool, Pairing, bool, bool],
    ) -> Tensor:
        """Return y in the type the layer itself would return."""
        scale, tall, pairing, through_weight, rebuild = how
        u = Update(A, B, lam, gam, scale, tall, pairing)
        device = x.device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = lower or lam.dtype
        with torch.autocast(device, enabled=False):
            xs = x.to(kind)
            if through_weight:
                built = delta(u, weight).to(kind)
                y = F.linear(xs, built, None if bias is None else bias.to(kind))
            else:
                built = scaled_basis(u).to(kind)
                basis = B.to(kind)
                y = F.linear(F.linear(xs, built), basis) if tall else xs @ basis @ built
        ctx.how, ctx.kind = how, kind
        kept = None if rebuild else built
        ctx.save_for_backward(x, weight, lam, gam, A, B, kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the weight and bias if they are trained, Lambda and Gamma."""
        x, weight, lam, gam, A, B, built = ctx.saved_tensors
        scale, tall, pairing, through_weight, _ = ctx.how
        u = Update(A, B, lam, gam, scale, tall, pairing)
        of_x, of_weight, of_bias, of_lam, of_gam = ctx.needs_input_grad[:5]
        dx = dweight = dbias = dlam = dgam = None
        with torch.autocast(x.device.type, enabled=False):
            dys = dy.reshape(-1, dy.shape[-1]).to(ctx.kind)
            xs = x.reshape(-1, x.shape[-1]).to(ctx.kind)
            if of_x:
                if built is None:
                    built = delta(u, weight) if through_weight else scaled_basis(u)
                    built = built.to(ctx.kind)
                if through_weight:
                    dx = dys @ built
                elif tall:
                    dx = (dys @ B.to(ctx.kind)) @ built
                else:
                    dx = F.linear(F.linear(dys, built), B.to(ctx.kind))
                dx = dx.view(x.shape).to(x.dtype)
            del built
            if of_weight:
                dweight = (dys.T @ xs).to(weight.dtype)
            if of_bias:
                dbias = dys.sum(0).to(lam.dtype)
            if of_lam or of_gam:
                dlam, dgam = scale_gradients(_scaled_gradient(xs, dys, u), u)
        return dx, dweight, dbias, dlam, dgam, None, None, None


def _scaled_gradient(x: Tensor, dy: Tensor, u: Update) -> Tensor:
    """Gradient of the scaled A ``(R, a)`` from inputs and outputs' gradients of all tokens."""
    short, long = (x, dy) if u.tall else (dy, x)
    tokens, a, b, R = len(x), short.shape[1], long.shape[1], u.B.shape[1]
    if tokens * a * b + a * b * R <= tokens * R * (a + b):
        return u.B.T.to(u.lam.dtype) @ (long.T @ short).to(u.lam.dtype)
    return ((long @ u.B.to(long.dtype)).T @ short).to(u.lam.dtype)


def linear(
    x: Tensor,
    u: Update,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    low_memory: bool = False,
) -> Tensor:
    """Return ``x (W + D)^T + bias``; without a weight ``x D^T``.

    Parameters
    ----------
    x
        Inputs ``(..., in)``.
    u
        The adapter's numbers.
    weight
        ``W (out, in)`` of the type of Lambda, or None to leave the layer's own product to others.
    bias
        ``(out,)``; only beside a weight.
    low_memory
        Build W + D again in backward, rather than keep it from the forward pass.

    Examples
    --------
    >>> A, B = torch.ones(1, 1, 2), torch.ones(3, 2, 1)
    >>> u = update_of(A, B, torch.ones(1, 2), torch.ones(2, 2), 0.5, (3, 2))
    >>> linear(torch.tensor([[1.0, 2.0]]), u)
    tensor([[3., 3., 3.]])
    """
    through_weight = weight is not None or by_weight(x, u, low_memory)
    how = (u.scale, u.tall, u.pairing, through_weight, low_memory)
    function: Any = _Linear.apply
    y: Tensor = function(x, weight, bias, u.lam, u.gam, u.A, u.B, how)
    return y


def by_weight(x: Tensor, u: Update, low_memory: bool, *, shared: bool = False) -> bool:
    """Whether forming D costs fewer multiplications than two thin products a token.

    ``shared`` says that D can be added to the weight, whose own product then serves both. The
    answer is the same with gradients and without, so that a model that was loaded gives what the
    trained one gave, to the last bit.
    """
    tokens, a, (b, R) = x.numel() // x.shape[-1], u.A.shape[-1], u.B.shape
    # Forward and the gradient of x; D is formed once for both, or again for the second.
    forming = a * b * R * (1 + low_memory)
    return forming + (0 if shared else 2 * tokens * a * b) < 2 * tokens * R * (a + b)
