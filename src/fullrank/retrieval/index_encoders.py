"""The encoders of an index: where their models are, loaded when first needed."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fullrank.core.errors import InputError, StoreError
from fullrank.core.models import DEFAULT_ENCODER
from fullrank.retrieval.index_manifest import EncoderRecord
from fullrank.retrieval.index_vectors import Vectors

Encoders: TypeAlias = Any
"""One encoder or a mapping from names to encoders; an encoder is a name, a folder, an
:class:`~fullrank.retrieval.Encoder` or a ``SentenceTransformer``."""

MODELS = "models"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# How near vectors have to be to those stored, when an encoder's key is another one: arithmetic of
# another precision gives other digits, another model gives other vectors.
_SAME, _OTHER_DTYPE = 0.999, 0.98


def named_encoders(encoders: Encoders) -> dict[str, Any]:
    """Give every encoder a name, its model's where it has none.

    Raises
    ------
    InputError
        For a name that a file cannot have.

    Examples
    --------
    >>> named_encoders("models/tuned")
    {'tuned': 'models/tuned'}
    """
    if encoders is None:
        return {}
    if not isinstance(encoders, Mapping):
        source = getattr(encoders, "source", encoders)
        plain = str(source) if isinstance(source, (str, Path)) else "encoder"
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(plain).name).strip("-._")[:64]
        encoders = {name or "encoder": encoders}
    for name in encoders:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"the encoder name {name!r} will not do: up to 64 letters, digits, '.', '_', '-', "
                "e.g. 'tuned'"
            )
    return dict(encoders)


def load_encoders(encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Load those that are names, folders or models; an Encoder stays the same object.

    Raises
    ------
    InputError
        For a model that is not there.
    """
    if not encoders:
        return {}
    from fullrank.retrieval.encoder import Encoder

    return {
        name: given if isinstance(given, Encoder) else Encoder(given)
        for name, given in encoders.items()
    }


def describe(name: str, encoder: Any, folder: Path, part: Path) -> EncoderRecord:
    """Write down where a model is; one that is nowhere on disk is copied into the generation."""
    source = encoder.source
    if source is None:
        encoder.model.save(str(part / MODELS / name), create_model_card=False)
        home, model = "inside", name
    elif source != DEFAULT_ENCODER and Path(source).expanduser().is_dir():
        home, model = "folder", _reference(Path(source).expanduser(), folder)
    else:
        home, model = "name", source
    return EncoderRecord.model_validate(
        {
            "model": model,
            "home": home,
            "key": encoder.key,
            "dimension": encoder.dimension,
            "dtype": encoder.dtype,
            "max_tokens": encoder.max_tokens,
            "query_prompt": encoder.prompt("query"),
            "document_prompt": encoder.prompt("document"),
        }
    )


def _reference(model: Path, folder: Path) -> str:
    """Return a path relative to the index when both move together, absolute otherwise."""
    model, folder = model.resolve(), folder.resolve()
    if model.is_relative_to(folder.parent) and folder.parent != Path(folder.anchor):
        return Path(os.path.relpath(model, folder)).as_posix()
    return model.as_posix()


def carry_models(old: Path, part: Path, encoders: Mapping[str, EncoderRecord]) -> None:
    """Bring models that lie inside the old generation into the new one, by links where possible."""
    for record in encoders.values():
        source, target = old / MODELS / record.model, part / MODELS / record.model
        if record.home == "inside" and not target.exists():
            shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


class StoredEncoder:
    """An encoder whose vectors an index holds. Its model is loaded when something is encoded.

    Attributes
    ----------
    name
        Its name in the index.
    record
        What the manifest says about it.
    model
        Name or folder of the model.
    """

    def __init__(
        self,
        name: str,
        record: EncoderRecord,
        model: Any,
        probe: Callable[[], tuple[list[str], Vectors]],
    ) -> None:
        self.name, self.record, self.model = name, record, model
        self._probe = probe
        self._encoder: Any = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"StoredEncoder({self.name!r}, {str(self.model)!r}, d={self.record.dimension})"

    @property
    def dimension(self) -> int:
        """Length d of a vector."""
        return self.record.dimension

    @property
    def max_tokens(self) -> int:
        """Tokens that a text is cut to."""
        return self.record.max_tokens

    @property
    def loaded(self) -> Any:
        """The :class:`~fullrank.retrieval.Encoder`, loaded now if it was not.

        Raises
        ------
        StoreError
            When the model is gone, or no longer the one that made the stored vectors.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            return self._encoder

    def adopt(self, encoder: Any) -> None:
        """Take a loaded encoder of the same key instead of loading one."""
        if encoder.key == self.record.key:
            self._encoder = encoder

    def adopt_from(self, other: StoredEncoder | None) -> None:
        """Take what another one has loaded, where both are of the same model."""
        if other is not None and other._encoder is not None and other.record.key == self.record.key:
            self._encoder = other._encoder

    def _load(self) -> Any:
        from fullrank.retrieval.encoder import Encoder

        if isinstance(self.model, Path) and not self.model.is_dir():
            raise StoreError(
                f"the model of encoder {self.name!r} is not at {self.model}; put it back, or open "
                f"the index with encoders={{{self.name!r}: its folder}}"
            )
        try:
            encoder = self.model if isinstance(self.model, Encoder) else self._build(Encoder)
        except InputError as error:
            raise StoreError(
                f"the model of encoder {self.name!r} cannot be loaded: {error}"
            ) from error
        if encoder.key != self.record.key and not self._agrees(encoder):
            raise StoreError(
                f"the model of encoder {self.name!r} ({self.model}) is not the one that made the "
                "vectors of this index: create the index again, or put the old model back"
            )
        return encoder

    def _build(self, encoder_type: Any) -> Any:
        record = self.record
        options = {
            "max_tokens": record.max_tokens,
            "query_prompt": record.query_prompt,
            "document_prompt": record.document_prompt,
        }
        try:
            encoder = encoder_type(self.model, dtype=record.dtype, **options)
            encoder.dtype  # noqa: B018 - says whether this machine has it
        except InputError:
            if record.dtype == "float32":
                raise
            encoder = encoder_type(self.model, **options)
        if encoder.dimension > record.dimension:
            encoder.model.truncate_dim = record.dimension  # which a saved model does not know
        return encoder

    def _agrees(self, encoder: Any) -> bool:
        texts, stored = self._probe()
        if encoder.dimension != self.record.dimension:
            return False
        near = np.sum(encoder.encode(texts) * stored, axis=1).min(initial=1)
        return bool(near >= (_SAME if encoder.dtype == self.record.dtype else _OTHER_DTYPE))
