"""`Encoder`: texts to unit vectors, fast on a CPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError, require
from fullrank.core.models import DEFAULT_ENCODER, load_sentence_transformer
from fullrank.core.progress import progress as progress_bar
from fullrank.retrieval.encoder_identity import content_hash, described, weight_state
from fullrank.retrieval.retriever import readable
from fullrank.retrieval.rust_tokenizers import rust_tokenizer

if TYPE_CHECKING:
    import torch

Vectors = npt.NDArray[np.float32]
DType = Literal["auto", "float32", "bfloat16", "int8"]
Kind = Literal["document", "query"]

_DTYPES = ("auto", "float32", "bfloat16", "int8")
# Counts up when the numbers that some dtype gives change, so that caches notice.
_VERSION = 1
# Texts tokenised at once: sorting by length works inside such a window, memory stays bounded.
_WINDOW = 16_384
# Longest text, in tokens, beyond which a model's limit means that it has none.
_NO_LIMIT = 1_000_000
# Names under which models keep their prompts, as in sentence-transformers.
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


class _Engine(NamedTuple):
    """How texts become vectors: over packed tokens where possible, else as the library does."""

    dtype: str
    packed: Any
    model: Any
    reason: str


class Encoder:
    """A sentence-transformers model that turns texts into unit vectors.

    On a CPU, models of the BERT family run over packed sequences, without padding and in the
    arithmetic that the CPU is fastest in. Before that path is used it is compared with the model
    itself on texts that are built in; whatever does not pass, or is not known (other
    architectures, adapters, hooks, a GPU), is encoded by sentence-transformers.

    Parameters
    ----------
    model
        A name (see :func:`~fullrank.core.resolve_model`), a folder, or a ``SentenceTransformer``,
        which is never changed. When its weights change later, the encoder notices and reads them
        again.
    device
        Where to compute; by default where the model is, or what sentence-transformers picks.
    dtype
        ``"float32"`` gives sentence-transformers' numbers to 1e-5. ``"bfloat16"`` and ``"int8"``
        are faster where the CPU multiplies them natively. ``"auto"``: on a CPU with VNNI or AMX
        ``"int8"``, with AMX ``"bfloat16"`` for models that cannot be had in 8 bits; on a GPU
        ``"bfloat16"`` where it has it; ``"float32"`` otherwise. (AVX-512 has bfloat16
        instructions too, but no faster than its float32 ones.)
    max_tokens
        Texts are cut to so many tokens; the model's own limit by default.
    batch_tokens
        Tokens a batch.
    query_prompt, document_prompt
        Put in front of every query or document; by default what the model's configuration says.
        An empty string for none.

    Raises
    ------
    InputError
        For an unknown dtype, a model that is not there, or a limit that the model does not have.

    Examples
    --------
    >>> encoder = Encoder()
    >>> encoder.encode(["a text", "another one"]).shape
    (2, 384)
    """

    def __init__(
        self,
        model: Any = DEFAULT_ENCODER,
        *,
        device: str | None = None,
        dtype: DType = "auto",
        max_tokens: int | None = None,
        batch_tokens: int = 4096,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
        if batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}; a batch holds at least one token")
        self.model: Any = _load(model, device)
        self.device: torch.device = self.model.device
        if device is not None and self.device.type != str(device).partition(":")[0]:
            self.model = copy.deepcopy(self.model).to(device)
            self.device = self.model.device
        self.tokenizer: Any = self.model.tokenizer
        self.max_tokens = _token_limit(self.model, max_tokens)
        self.batch_tokens = batch_tokens
        self._wanted = dtype
        self._prompts = {
            "query": _prompt(self.model, "query", query_prompt),
            "document": _prompt(self.model, "document", document_prompt),
        }
        self._lock = threading.Lock()
        self._state: tuple[tuple[int, int], ...] | None = None
        self._built: _Engine | None = None
        self._key: str | None = None
        self._fingerprint: tuple[Any, str] | None = None
        self._cut = rust_tokenizer(self.tokenizer, self.max_tokens)
        self._named = None if not isinstance(model, (str, Path)) else str(model)
        self._loaded = weight_state(self.model)

    def __repr__(self) -> str:
        return f"Encoder(dimension={self.dimension}, max_tokens={self.max_tokens})"

    @property
    def dimension(self) -> int:
        """Length d of a vector."""
        return int(self.model.get_embedding_dimension())

    @property
    def dtype(self) -> str:
        """What is computed in: ``"float32"``, ``"bfloat16"`` or ``"int8"``."""
        return self._engine().dtype

    @property
    def path(self) -> str:
        """Which path runs, in words: ``"packed"``, or why it is sentence-transformers' own."""
        engine = self._engine()
        return "packed" if engine.packed is not None else engine.reason

    @property
    def source(self) -> str | None:
        """Name or folder it was made from; None for a model object or weights changed since."""
        return self._named if weight_state(self.model) == self._loaded else None

    def prompt(self, kind: Kind) -> str:
        """Return what is put in front of every text of this kind."""
        return self._prompts[kind]

    @property
    def key(self) -> str:
        """SHA-256 over weights, configuration and dtype: equal keys give equal vectors.

        On another kind of CPU, equal up to rounding, which in 8 bits is a hundredth.
        """
        engine = self._engine()
        with self._lock:
            if self._key is None:
                settings = [_VERSION, engine.dtype, self.max_tokens, sorted(self._prompts.items())]
                self._key = content_hash(self.model, [*settings, engine.packed is None])
            return self._key

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the vectors on this machine; nothing is built for it.

        It holds weights, configuration, the dtype asked for and what this CPU can do. For caches
        that stay on one machine; :attr:`key` is for those that travel.
        """
        import torch

        from fullrank.retrieval.fast_encoder_int8 import has_amx

        machine = [torch.__version__, self.device.type]
        if self.device.type == "cpu":
            machine += [torch.backends.cpu.get_cpu_capability(), f"amx={has_amx()}"]
        prompts = sorted(self._prompts.items())
        settings = [_VERSION, *machine, self._wanted, self.max_tokens, prompts]
        # Weights take a tenth of a second, so they are read again only when they changed.
        asked = (self.state, described(self.model, settings).hexdigest())
        if self._fingerprint is None or self._fingerprint[0] != asked:
            self._fingerprint = asked, content_hash(self.model, settings)
        return self._fingerprint[1]

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Something cheap that changes when a weight is written to, replaced or moved."""
        return weight_state(self.model)

    def encode(
        self, texts: Sequence[str], *, kind: Kind = "document", progress: bool = False
    ) -> Vectors:
        """Turn texts into unit vectors.

        Parameters
        ----------
        texts
            Any number, of any length; what exceeds ``max_tokens`` is cut off.
        kind
            Which prompt to use.
        progress
            Whether to show a bar.

        Returns
        -------
        ndarray
            ``(len(texts), d)``, float32; row i belongs to text i.

        Raises
        ------
        InputError
            When ``texts`` is a single string, or something in it is no string.
        """
        prompt = self._checked(texts, kind)
        engine = self._engine()
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        with progress_bar("encode", len(texts), progress, unit=f"{kind}s") as advance:
            for start in range(0, len(texts), _WINDOW):
                window = [readable(text) for text in texts[start : start + _WINDOW]]
                rows = out[start : start + _WINDOW]
                if engine.packed is None:
                    self._library_encode(engine, window, kind, rows, advance)
                else:
                    self._packed_encode(engine, [prompt + t for t in window], rows, advance)
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        out /= np.maximum(norms, np.finfo(np.float32).tiny)
        return out

    def _checked(self, texts: Sequence[str], kind: Kind) -> str:
        if isinstance(texts, (str, bytes)):
            raise InputError("texts is a single string; give a list of strings")
        if kind not in self._prompts:
            raise InputError(f"kind {kind!r} is neither 'document' nor 'query'")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {row} is a {type(text).__name__}, not a string")
        return self._prompts[kind]

    # -- the two paths ---------------------------------------------------------------------

    def _packed_encode(
        self, engine: _Engine, texts: list[str], out: Vectors, advance: Callable[[int], None]
    ) -> None:
        import torch

        ids = [e.ids for e in self._cut.encode_batch_fast(texts)]
        with torch.inference_mode():
            for rows in _batches([len(i) for i in ids], self.batch_tokens):
                found = engine.packed([ids[row] for row in rows]).numpy()
                out[rows] = found[:, : out.shape[1]]  # a truncate_dim cuts what the network gives
                advance(len(rows))

    def _library_encode(
        self,
        engine: _Engine,
        texts: list[str],
        kind: Kind,
        out: Vectors,
        advance: Callable[[int], None],
    ) -> None:
        # By kind, since a model may have other layers for queries, and told apart from the text,
        # since a model may leave the prompt out of its pooling.
        encode = engine.model.encode_query if kind == "query" else engine.model.encode_document
        size = max(1, min(256, self.batch_tokens * 2 // self.max_tokens))
        options: dict[str, Any] = {"prompt": self._prompts[kind], "batch_size": size}
        if self.max_tokens != engine.model.max_seq_length:
            # For this call only: a model that belongs to the user keeps its own limit.
            cut = {"max_length": self.max_tokens, "truncation": True}
            options["processing_kwargs"] = {"text": cut}
        for start in range(0, len(texts), step := 32 * size):
            part = texts[start : start + step]
            out[start : start + step] = encode(part, show_progress_bar=False, **options)
            advance(len(part))

    # -- building ----------------------------------------------------------------------------

    def _engine(self) -> _Engine:
        state = self.state
        with self._lock:
            if self._built is None or state != self._state:
                self._built, self._state, self._key = self._build(), state, None
            return self._built

    def _build(self) -> _Engine:
        import torch

        from fullrank.retrieval.fast_encoder import UnsupportedModelError
        from fullrank.retrieval.fast_encoder_check import checked_engine

        wanted, reason = self._wanted, "not on a CPU"
        if self.device.type == "cpu":
            try:
                if self._cut is None:
                    raise UnsupportedModelError("a tokenizer that is not a fast one")
                with torch.no_grad():
                    dtype, packed = checked_engine(self.model, wanted, self._cut.encode_batch_fast)
                return _Engine(dtype, packed, self.model, "")
            except UnsupportedModelError as error:
                reason = str(error)
        if wanted == "int8":
            raise InputError(
                f"this model cannot be run in int8 ({reason}); use dtype='auto' or 'float32'"
            )
        if wanted == "bfloat16" or (wanted == "auto" and _bfloat16_pays(self.device)):
            cast = copy.deepcopy(self.model).to(torch.bfloat16)
            return _Engine("bfloat16", None, cast, reason)
        return _Engine("float32", None, self.model, reason)


def _load(model: Any, device: str | None) -> Any:
    library = require("sentence_transformers", extra="hf")
    if isinstance(model, library.SentenceTransformer):
        return model
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"the model is a {type(model).__name__}; give a name, a folder or a SentenceTransformer"
        )
    return load_sentence_transformer(model, device)


def _token_limit(model: Any, wanted: int | None) -> int:
    own = model.max_seq_length
    if own is not None and own > _NO_LIMIT:
        own = None
    inner = getattr(model[0], "auto_model", None)
    most = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if most is not None and padding is not None:
        # RoBERTa and its kin count positions from behind that of padding.
        most -= padding + 1
    if wanted is None:
        return int(own or most or 512)
    if wanted < 3 or (most is not None and wanted > most):
        raise InputError(f"max_tokens is {wanted}; this model takes 3 to {most or 'any number'}")
    return wanted


def _prompt(model: Any, kind: str, given: str | None) -> str:
    if given is not None:
        return given
    prompts = getattr(model, "prompts", None) or {}
    # The library gives every model empty prompts of its own names; those do not count.
    return next((prompts[name] for name in _PROMPTS[kind] if prompts.get(name)), "")


def _bfloat16_pays(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # AVX-512 has bfloat16 too, at half the speed of its float32 on the CPUs this was tried on.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return device.type == "cpu" and bool(has_amx())


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows by falling length, as many at a time as the budget of tokens holds."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batch: list[int] = []
    held = 0
    for row in order:
        if batch and held + lengths[row] > budget:
            yield batch
            batch, held = [], 0
        batch.append(row)
        held += lengths[row]
    if batch:
        yield batch
