"""The models that methods are compared on, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.bench.shrink_subject import Subject
from fullrank.bench.shrink_subject_encoder import EncoderSubject
from fullrank.bench.shrink_subject_images import ImageSubject
from fullrank.bench.shrink_subject_lm import LMSubject
from fullrank.core.errors import InputError

SUBJECTS: dict[str, Callable[[ShrinkSize, Path], Subject]] = {
    "cifar10": ImageSubject,
    "lm": lambda size, folder: LMSubject("tinyshakespeare", size, folder),
    "vaswani": lambda size, _: EncoderSubject("vaswani", size),
    "cranfield": lambda size, _: EncoderSubject("cranfield", size),
    "pydocs": lambda size, _: EncoderSubject("pydocs", size),
}
"""Name -> how a subject is made: a size, and a folder where trained models are kept."""


def chosen_subjects(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of subjects, all by default.

    Raises
    ------
    InputError
        For a name that no subject has.
    """
    for name in names or ():
        if name not in SUBJECTS:
            raise InputError(f"no model {name!r} to shrink; there are {', '.join(SUBJECTS)}")
    return tuple(name for name in SUBJECTS if not names or name in names)
