"""A folder with an adapter of any type, on its base model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fullrank.adapters.export import check_base
from fullrank.adapters.lora_reading import read_config
from fullrank.adapters.registration import TUNERS, make_known
from fullrank.core.errors import InputError, require
from fullrank.core.models import load_model

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def load_adapter(folder: str | Path, base: str | Path | None = None) -> Any:
    """Load an adapter on its base model, after a look at whether it is for that one.

    Parameters
    ----------
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    base
        Folder or Hugging Face name of the base model; None for the one that the adapter names.

    Returns
    -------
    PeftModel
        In evaluation mode.

    Raises
    ------
    InputError
        When there is no such base model, or the adapter is for another one.
    StoreError
        When the folder holds no adapter.

    Examples
    --------
    >>> model = load_adapter("adapter")  # doctest: +SKIP
    """
    transformers = require("transformers", extra="hf")
    config = read_config(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{folder} names no base model; give one (--base)")
    task = config.get("task_type")
    options: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        # A head of another size that the base may have is replaced by the adapter's.
        options.update(num_labels=_labels(folder), ignore_mismatched_sizes=True)
    kind = "AutoModelForSequenceClassification" if task == "SEQ_CLS" else _CLASSES.get(str(task))
    loader = getattr(transformers, kind or "AutoModel")
    model = load_model(name, lambda source: loader.from_pretrained(source, **options))
    if config.get("peft_type") == "LORA":
        check_base(model, folder)
    return put_on(model, folder).eval()


def put_on(model: Any, folder: str | Path) -> Any:
    """Put an adapter from a folder on a base model that is there already, whatever its type.

    Raises
    ------
    StoreError
        When the folder holds no adapter.
    """
    peft = require("peft", extra="adapters")
    make_known(str(read_config(folder).get("peft_type")))
    return peft.PeftModel.from_pretrained(model, str(folder))


def save_alone(model: Any, adapter: str, folder: str | Path) -> Path:
    """Write one of several adapters into a folder, without one of its name below it."""
    target = Path(folder)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent) as part:
        model.save_pretrained(part, selected_adapters=[adapter])
        (Path(part) / adapter).replace(target)
    return target


def how_to_load(folder: str | Path) -> str:
    """Say in Python what loads an adapter on its base model."""
    module = TUNERS.get(str(read_config(folder).get("peft_type")))
    before = f"import {module}; " if module else ""
    return f"{before}peft.PeftModel.from_pretrained(base, {str(folder)!r})"


def _labels(folder: str | Path) -> int:
    """How many labels the classifier in an adapter's file tells apart."""
    from safetensors import safe_open

    from fullrank.adapters.lora_reading import WEIGHTS

    with safe_open(str(Path(folder) / WEIGHTS), framework="pt") as file:
        heads = [
            key
            for key in file.keys()  # noqa: SIM118
            if key.endswith((".classifier.weight", ".score.weight", ".out_proj.weight"))
        ]
        return int(file.get_slice(heads[0]).get_shape()[0]) if heads else 2
