"""RandLoRA's frozen random bases: one pair for all layers, the same from one key on any machine.

They are drawn as whole numbers and divided by their standard deviation, which is computed in whole
numbers too: no order of summation and no fused instruction can change a bit. A file then needs no
more than their checksum, or three bytes an entry (one, where they are sparse).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError, StoreError

Kind = Literal["dense", "sparse", "very_sparse"]

# Uniform numbers of torch have 24 bits; centred they are signed, and exact in float32.
_BITS = 24
_HALF = 1 << (_BITS - 1)


@dataclass(frozen=True)
class Recipe:
    """What the bases follow from.

    Attributes
    ----------
    kind
        ``"dense"``: uniform; ``"sparse"``: -1, 0 and 1 with probabilities 1/6, 2/3, 1/6;
        ``"very_sparse"``: the same with ``1 / (2 q)`` each for -1 and 1, ``q = sqrt(width)``.
    r
        Rank of a basis.
    width, length
        The largest shorter and the largest longer side of the layers.
    narrowest
        The smallest shorter side.
    key
        Seed of the generator.

    Examples
    --------
    >>> recipe = Recipe.of([(8, 6), (5, 9)], r=2)
    >>> A, B = recipe.draw()
    >>> A.shape, B.shape
    (torch.Size([2, 1, 6]), torch.Size([9, 3, 2]))
    """

    kind: Kind
    r: int
    width: int
    length: int
    narrowest: int
    key: int

    @classmethod
    def of(
        cls, shapes: Iterable[tuple[int, int]], r: int, kind: Kind = "dense", key: int = 0
    ) -> Self:
        """Make the recipe for layers of these shapes ``(out, in)``."""
        sides = [(min(shape), max(shape)) for shape in shapes]
        short = [a for a, _ in sides]
        return cls(kind, r, max(short), max(b for _, b in sides), min(short), key)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return ``A (r, 1, width)`` and ``B (length, N, r)`` as whole numbers, on the CPU.

        Uniform ones come in the order in which the official code draws its float32 bases, ternary
        ones as there and in PEFT; but a line of zeros, which would freeze an input or output of
        every layer for ever, is drawn again.
        """
        generator = torch.Generator().manual_seed(self.key)
        count = bases_needed(self.width, self.r)
        if self.kind == "dense":
            A = _uniform((self.r, 1, self.width), generator)
            B = torch.empty(self.length, count, self.r, dtype=torch.int32)
            for j in range(count):
                B[:, j] = _uniform((self.length, self.r), generator)
            return A, B
        q = 3.0 if self.kind == "sparse" else math.sqrt(self.width)
        A = _ternary((self.r, 1, self.width), q, generator)
        B = _ternary((self.length, count, self.r), q, generator)
        _revive(A[:, 0].T, q, generator)
        # The narrowest layer sees the fewest bases.
        fewest = bases_needed(self.narrowest, self.r)
        _revive(B.view(self.length, -1)[:, : fewest * self.r], q, generator)
        return A, B


def bases_needed(width: int, r: int) -> int:
    """N: how many bases of rank r fill the shorter side of a layer.

    >>> bases_needed(384, 32), bases_needed(10, 4)
    (12, 3)
    """
    return -(-width // r)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * (2 * _HALF)).to(torch.int32) - _HALF


def _ternary(shape: tuple[int, ...], q: float, generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=generator)
    return (u > 1 - 1 / (2 * q)).to(torch.int8) - (u < 1 / (2 * q)).to(torch.int8)


def _revive(lines: Tensor, q: float, generator: torch.Generator) -> None:
    """Draw rows without an entry again, in place."""
    while len(dead := (lines == 0).all(1).nonzero()[:, 0]):
        lines[dead] = _ternary((len(dead), lines.shape[1]), q, generator)


def standardised(codes: Tensor) -> Tensor:
    """Divide whole numbers by their standard deviation; float32, the same bits anywhere.

    >>> standardised(torch.tensor([-1, 0, 1], dtype=torch.int8))
    tensor([-1.,  0.,  1.])
    """
    total = squares = 0
    # Squares have at most 46 bits: the sum of a piece fits in 63.
    for piece in torch.split(codes.reshape(-1), 1 << 16):
        whole = piece.long()
        total += int(whole.sum())
        squares += int(whole.square().sum())
    count = codes.numel()
    variance = (count * squares - total**2) / (count * max(count - 1, 1))
    # A lone entry has none; it becomes 1 or -1.
    deviation = math.sqrt(variance) or math.sqrt(squares / count)
    return codes.to(torch.float32) * (1 / deviation)


def packed(codes: Tensor) -> Tensor:
    """Three bytes for each of 24 bits ``(..., 3)``; ternary numbers stay as they are."""
    if codes.dtype == torch.int8:
        return codes
    whole = (codes + _HALF).contiguous()
    return whole.view(torch.uint8).view(*codes.shape, 4)[..., :3].clone()


def unpacked(stored: Tensor) -> Tensor:
    """Undo :func:`packed`."""
    if stored.dtype == torch.int8:
        return stored
    wide = torch.nn.functional.pad(stored, (0, 1)).contiguous()
    return wide.view(torch.int32)[..., 0] - _HALF


def checksum(A: Tensor, B: Tensor) -> Tensor:
    """SHA-256 over shapes and float32 values; 32 bytes."""
    digest = hashlib.sha256()
    for values in (A, B):
        digest.update(repr(tuple(values.shape)).encode())
        digest.update(values.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


class Bases(nn.Module):
    """The bases of an adapter, held once by the model, whatever the number of layers.

    In a state they are a checksum, with the packed numbers beside it if ``stored``. Loading a
    checksum alone checks it against what the key gave; loading numbers takes them.

    Parameters
    ----------
    recipe
        What to draw.
    stored
        Whether a state holds the numbers themselves.
    dtype
        Type of the buffers; they are drawn in float32 whatever it is.
    like
        Bases of the same recipe and type, as the key gave them, whose tensors to use as well.

    Examples
    --------
    >>> bases = Bases(Recipe.of([(8, 6)], r=2))
    >>> {name: tuple(t.shape) for name, t in bases.state_dict().items()}
    {'checksum': (32,), 'A': (2, 1, 6, 3), 'B': (8, 3, 2, 3)}
    """

    A: Tensor
    B: Tensor
    checksum: Tensor

    def __init__(
        self,
        recipe: Recipe,
        stored: bool = True,
        dtype: torch.dtype = torch.float32,
        *,
        like: Bases | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.stored, self.dtype = recipe, stored, dtype
        # Numbers that did not come from the key, as they are in a file; None when they did.
        self.given: tuple[Tensor, Tensor] | None = None
        if like is None:
            A, B = (standardised(codes) for codes in recipe.draw())
            found = checksum(A, B)
        else:
            A, B, found = like.A, like.B, like.checksum
        self.register_buffer("A", A.to(dtype), persistent=False)
        self.register_buffer("B", B.to(dtype), persistent=False)
        self.register_buffer("checksum", found)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What no key gives must be stored.
        if self.stored or self.given:
            given = self.given or tuple(packed(codes) for codes in self.recipe.draw())
            destination[f"{prefix}A"], destination[f"{prefix}B"] = given

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        found = {name: state_dict.pop(f"{prefix}{name}", None) for name in ("A", "B", "checksum")}
        if found["A"] is not None and found["B"] is not None:
            self._take(found["A"], found["B"], found["checksum"])
        elif found["checksum"] is not None:
            if not torch.equal(found["checksum"].cpu(), self.checksum.cpu()):
                raise InputError(
                    f"the bases that key {self.recipe.key} gives for these layers are not those "
                    "the adapter was trained with (their checksums differ): load it with its own "
                    "projection_key, r and bases, on a model with the same target layers"
                )
        else:
            # missing_keys
            rest[2].append(f"{prefix}checksum")

    def _take(self, A: Tensor, B: Tensor, expected: Tensor | None) -> None:
        r, width, length = self.recipe.r, self.recipe.width, self.recipe.length
        count = bases_needed(width, r)
        values = [
            t.to("cpu", torch.float32) if t.is_floating_point() else standardised(unpacked(t.cpu()))
            for t in (A, B)
        ]
        if expected is not None and not torch.equal(checksum(*values), expected.cpu()):
            raise StoreError(
                "the bases in the file do not match their checksum: the file is damaged; get "
                "another copy of the adapter"
            )
        # Files of PEFT hold more than the layers use.
        a, b = values[0][..., :width], values[1][:length, :count]
        if a.shape != (r, 1, width) or b.shape != (length, count, r):
            raise InputError(
                f"the file's bases are {tuple(A.shape)} and {tuple(B.shape)}, too small for rank "
                f"{r} and these layers, which need {(r, 1, width)} and {(length, count, r)}; load "
                "it with its own r and target_modules"
            )
        found = checksum(a, b)
        if torch.equal(found, self.checksum.cpu()):
            return
        # What is packed can be written again as it came, unless it was cut.
        whole = not A.is_floating_point() and values[1].shape == b.shape
        self.given = (A.cpu(), B.cpu()) if whole else (a.clone(), b.clone())
        device = self.A.device
        self.A, self.B = a.to(device, self.dtype), b.to(device, self.dtype)
        self.checksum = found.to(device)
