"""What optimizers share that leave out radial updates: groups, the test, the step, old states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim import gradients
from fullrank.optim.channels import channels_of
from fullrank.optim.foundation import COUNTERS, Entry, FullrankOptimizer, own_part
from fullrank.optim.gradients import Verdict
from fullrank.optim.radial import NONE, RadialTest, scale_invariance
from fullrank.optim.sharded import check_placements, is_sharded, local


def _dimension(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}={value!r}; it must be a whole number, the channels' dimension")


_OURS = ("maximize", "channel_dim", "project_buffer")
"""Group keys that states saved by the package ``adamp`` do not have."""


class Scratch:
    """Memory that all parameters of one step share, two arrays a kind of parameter."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        self._arrays: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        for entry in entries:
            key = self._key(entry.param)
            self._sizes[key] = max(self._sizes.get(key, 0), entry.param.numel())

    @staticmethod
    def _key(param: Tensor) -> tuple[torch.device, torch.dtype]:
        return param.device, torch.promote_types(param.dtype, torch.float32)

    def of(self, param: Tensor, which: int = 0) -> Tensor:
        """A flat array with room for a parameter, in float32 at least; two are there."""
        device, dtype = self._key(param)
        key = device, dtype, which
        if key not in self._arrays:
            size = self._sizes[device, dtype]
            self._arrays[key] = torch.empty(size, dtype=dtype, device=device)
        return self._arrays[key]

    def like(self, param: Tensor, which: int) -> Tensor:
        """The same in the parameter's shape."""
        return self.of(param, which)[: param.numel()].view(param.shape)


class RadialOptimizer(FullrankOptimizer):
    """Tests each weight before the step and leaves the radial part of its update out."""

    checks: ClassVar[dict[str, valid.Check]] = {
        "lr": valid.at_least(0.0),
        "weight_decay": valid.at_least(0.0),
        "eps": valid.at_least(0.0),
        "delta": valid.at_least(0.0),
        "wd_ratio": valid.at_least(0.0),
        "nesterov": valid.truth,
        "maximize": valid.truth,
        "channel_dim": _dimension,
    }

    def __init__(self, params: Iterable[Any], arguments: Mapping[str, Any]) -> None:
        self._branches: dict[Tensor, int | Tensor] = {}
        super().__init__(params, arguments)

    def check_group(self, group: dict[str, Any]) -> None:
        """Weights must come in their own shape: rows and norms are what is tested."""
        for param in group["params"]:
            if type(param).__name__ == "FlatParameter":
                raise InputError(
                    f"{self.name_of(param)} is a FlatParameter, which has no rows: "
                    f"{type(self).__name__} tests the rows of each weight. Use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard) or DDP instead of FSDP1"
                )
            if is_sharded(param):
                check_placements(param, self.name_of(param))
            if param.dim() > 1 and not -param.dim() <= group["channel_dim"] < param.dim():
                raise InputError(
                    f"channel_dim={group['channel_dim']}, but {self.name_of(param)} "
                    f"has {param.dim()} dimensions"
                )

    def branch(self, param: Tensor) -> int | None:
        """Which view of a parameter passed the test in the last step: a diagnostic.

        Returns
        -------
        int or None
            0: neither, the update was left as it is; 1: every channel; 2: the layer as a whole.
            None for vectors, and before the first step. Reading it waits for the device.
        """
        found = self._branches.get(param)
        return None if found is None else int(found)

    def norms(self, entries: Sequence[Entry]) -> Sequence[Tensor]:
        """Norms of the gradients by those of their rows, which the test needs too: one pass."""
        vectors = [entry for entry in entries if not _tested(entry.param)]
        found = dict(zip(map(id, vectors), super().norms(vectors), strict=True))
        for entry in entries:
            if _tested(entry.param):
                channels = channels_of(entry.param, entry.group["channel_dim"])
                entry.norms = channels.norms(local(entry.grad))
                found[id(entry)] = torch.linalg.vector_norm(entry.norms)
        return [found[id(entry)] for entry in entries]

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Test, update the moments, and step, one parameter after the other."""
        for entry in entries:
            if entry.group["maximize"]:
                entry.grad = entry.grad.neg()
        parts = [own_part(entry) for entry in entries]
        scratch = Scratch(parts)
        for entry, part in zip(entries, parts, strict=True):
            param, group, found = entry.param, entry.group, None
            if _tested(param):
                found = scale_invariance(
                    param,
                    entry.grad,
                    group["delta"],
                    group["eps"],
                    group["channel_dim"],
                    scratch.of(part.param),
                    entry.norms,
                )
                if not gradients.host_decides(param.device):
                    self._branches[param] = found.branch
                else:
                    self._branches[param] = found.settle()
                    found = None if found.settle() == NONE else found
            self.advance_one(part, found, verdict.skip.get(param.device), scratch)

    def advance_one(
        self, entry: Entry, found: RadialTest | None, skip: Tensor | None, scratch: Scratch
    ) -> None:
        """Step one parameter, or this process' part of it; ``found``: None projects nothing."""
        raise NotImplementedError

    def move(
        self,
        entry: Entry,
        step: Tensor,
        size: float,
        decay: float,
        found: RadialTest | None,
        skip: Tensor | None,
        scratch: Tensor | None,
    ) -> Tensor | None:
        """Write ``w <- (1 - decay rho) w + size (step - c w)``; return c where there is one.

        Parameters
        ----------
        entry
            The parameter.
        step
            The step before projection, in the moments' dtype; zeros where it is skipped.
        size
            Factor on it.
        decay
            What a step takes off an unprojected weight.
        found
            The test's result, or None.
        skip
            A flag that only the device knows, or None.
        scratch
            Memory for a product, not that of ``step``.
        """
        param = entry.param
        weight = param.to(step.dtype)  # the parameter itself, unless in half precision
        factor: float | Tensor = 1.0 - decay
        radial = None
        if found is not None:
            radial = found.coefficients(weight, step, scratch)
            factor = 1.0 - decay * found.kept_decay(entry.group["wd_ratio"])
        if skip is not None:
            factor = torch.where(skip, step.new_ones(()), factor)
        if radial is not None:
            factor = factor - size * radial
        if size == 1.0 and isinstance(factor, Tensor):
            # One pass.
            torch.addcmul(step, weight, factor, out=weight)
        else:
            if isinstance(factor, Tensor) or factor != 1.0:
                weight.mul_(factor)
            weight.add_(step, alpha=size)
        if weight is not param:
            param.copy_(weight)
        return radial

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit; one saved by the package ``adamp`` will do.

        Raises
        ------
        InputError
            When the state belongs to another optimizer, or to parameters of other shapes.
        """
        super().load_state_dict(_completed(state_dict, self.param_groups))

    def forget(self) -> None:
        """Drop the last step's branches."""
        super().forget()
        self._branches.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_branches": {}}


def _tested(param: Tensor) -> bool:
    """Vectors are not, nor is what has no elements."""
    return param.dim() > 1 and param.numel() > 0


def _completed(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Give a state of the package ``adamp`` what it lacks; another is returned as it is."""

    def counted(state: Mapping[str, Any]) -> dict[str, Any]:
        if not state or "unseen" in state:
            return dict(state)
        counters = {
            key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in COUNTERS.items()
        }
        counters["step"] += float(state.get("step", 0))
        return {**state, **counters}

    own = [{key: group[key] for key in _OURS if key in group} for group in groups]
    own += [{}] * (len(state_dict["param_groups"]) - len(own))
    return {
        **state_dict,
        "state": {key: counted(state) for key, state in state_dict["state"].items()},
        "param_groups": [
            {**mine, **group} for mine, group in zip(own, state_dict["param_groups"], strict=False)
        ],
    }
