"""How large a comparison of shrinking methods is: data, networks, steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fullrank.core.errors import InputError

SHARES = (0.9, 0.75, 0.6, 0.5, 0.4)
"""Of the layers' parameters: what each method is asked to keep."""


@dataclass(frozen=True)
class ShrinkSize:
    """Data, networks and steps.

    Attributes
    ----------
    documents, texts, tokens
        Of the encoder: documents that are ranked at most (judged ones are always among them),
        texts of calibration and fine-tuning at most, and tokens that a text is cut to.
    images, test_images, channels, epochs
        Of CIFAR-10: images that are trained and tested on, channels of the network's first
        stage (64 in ResNet-18), epochs of its training.
    width, layers, heads, context, pretraining, dev_bytes
        Of the language model over bytes, and the steps of its training.
    batch, steps
        Examples of a step, and steps of fine-tuning; the same for all methods.
    lr, encoder_lr
        Peak learning rate of fine-tuning: of the network and the language model (a tenth and a
        third of their training's, whose end a higher one undoes), of the encoder.
    rounds
        Timings of a forward pass, of which the fastest counts.
    shares
        What is to be kept.
    """

    name: str
    documents: int
    texts: int
    tokens: int
    images: int
    test_images: int
    channels: int
    epochs: int
    width: int
    layers: int
    heads: int
    context: int
    pretraining: int
    dev_bytes: int
    batch: int
    steps: int
    rounds: int
    lr: float = 3e-4
    encoder_lr: float = 1e-4
    shares: tuple[float, ...] = SHARES

    def settings(self) -> dict[str, Any]:
        """Return all that a result depends on: not the name, nor which shares there are."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "shares")}


# quick is for a look (minutes), full for figures: hours on two cores.
_SIZES = (
    ShrinkSize(
        "quick",
        documents=400,
        texts=64,
        tokens=48,
        images=1500,
        test_images=1000,
        channels=8,
        epochs=8,
        width=64,
        layers=2,
        heads=4,
        context=64,
        pretraining=300,
        dev_bytes=8_192,
        batch=32,
        steps=20,
        rounds=3,
    ),
    ShrinkSize(
        "full",
        documents=2000,
        texts=512,
        tokens=64,
        images=12_000,
        test_images=2000,
        channels=24,
        epochs=12,
        width=192,
        layers=4,
        heads=4,
        context=128,
        pretraining=1500,
        dev_bytes=65_536,
        batch=32,
        steps=60,
        rounds=20,
    ),
)


def shrink_size(name: str, shares: tuple[float, ...] | None = None) -> ShrinkSize:
    """Return a size by name, with other shares where some are given.

    Raises
    ------
    InputError
        For an unknown name, or a share outside (0, 1].

    Examples
    --------
    >>> shrink_size("quick", (0.5,)).shares
    (0.5,)
    """
    found = next((size for size in _SIZES if size.name == name), None)
    if found is None:
        raise InputError(f"size {name!r}; it is one of {', '.join(s.name for s in _SIZES)}")
    for share in shares or ():
        if not 0 < share <= 1:
            raise InputError(f"share {share}; what is kept lies in (0, 1]")
    return replace(found, shares=shares or found.shares)
