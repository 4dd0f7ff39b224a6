"""`Texts`: plain texts in parts, to train language models on, and the readers that make them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError, require
from fullrank.datasets.jsonl import read_objects

PARTS = ("train", "dev", "test")
# Of a text that comes without parts, what is kept to measure on.
_HELD_OUT = 0.05
# Characters below which the end of a text is a crumb; of many such, every so many is held out. A
# prime keeps no step with texts that come in turn, such as questions and answers.
_SHORT, _EVERY = 2000, 19


@dataclass(frozen=True)
class Texts:
    """Documents to model the language of, divided into parts.

    Attributes
    ----------
    name
        What it is called.
    parts
        ``"train"`` and ``"dev"``, often ``"test"`` too; each a sequence of documents.
    manifest
        Where it came from, counts, and the SHA-256 of all of it.

    Raises
    ------
    InputError
        When a part is empty.

    Examples
    --------
    >>> texts = Texts.divided("notes", ["abc " * 100])
    >>> {part: texts.size(part) for part in texts.parts}
    {'train': 360, 'dev': 20, 'test': 20}
    """

    name: str
    parts: Mapping[str, tuple[str, ...]]
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, documents in self.parts.items():
            if not any(documents):
                raise InputError(f"the {part} part of {self.name} is empty; more text is needed")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {self.size(part):,}" for part in self.parts)
        return f"Texts({self.name}: bytes in {sizes})"

    def size(self, part: str) -> int:
        """UTF-8 bytes of a part."""
        return sum(len(text.encode()) for text in self.parts[part])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all parts."""
        digest = hashlib.sha256()
        for part in sorted(self.parts):
            digest.update(json.dumps([part, *self.parts[part]]).encode())
        return digest.hexdigest()

    @classmethod
    def divided(cls, name: str, documents: Sequence[str], **manifest: Any) -> Texts:
        """Divide documents without parts: the last tenth of each is held out, half for dev.

        A text that runs on is cut, rather than drawn from: neighbouring passages are too alike.
        Where 19 documents or more are shorter than 2000 characters, too short to be cut, these are
        held out whole: one in 19 for dev, and one for test.
        """
        short = [i for i, text in enumerate(documents) if 0 < len(text) < _SHORT]
        many = len(short) >= _EVERY
        turns = {i: turn % _EVERY for turn, i in enumerate(short)} if many else {}
        whole = {_EVERY // 2: "dev", _EVERY - 1: "test"}
        parts: dict[str, list[str]] = {part: [] for part in PARTS}
        for i, text in enumerate(documents):
            if i in turns:
                parts[whole.get(turns[i], "train")].append(text)
                continue
            held = int(len(text) * _HELD_OUT)
            cuts = [0, len(text) - 2 * held, len(text) - held, len(text)]
            for part, start, stop in zip(PARTS, cuts[:-1], cuts[1:], strict=True):
                if stop > start:
                    parts[part].append(text[start:stop])
        return cls(name, {part: tuple(texts) for part, texts in parts.items()}, manifest)


def read_texts(source: str | Path, *, field_name: str = "text") -> Texts:
    """Read texts to train a language model on.

    Parameters
    ----------
    source
        ``"python_source"`` (the built-in one, see :func:`~fullrank.datasets.python_source`);
        ``"tinyshakespeare"``, ``"wikitext-2"`` or ``"gsm8k"`` from the folder that the
        environment variable ``FULLRANK_DATA`` names; a text or JSONL file; a folder with
        ``train``, ``dev`` and ``test`` files (several of one, ``train.1.txt`` and so on, are
        joined; without ``dev`` one is cut off ``train``), or with any text files; or a data set
        of the Hugging Face hub as ``hf:NAME`` or ``hf:NAME:CONFIG``.
    field_name
        Field of a JSONL line, or column of a data set, that holds the text.

    Raises
    ------
    InputError
        When there is no such source, or no text in it.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("All's well that ends well. " * 20)
    >>> read_texts(path)
    Texts(notes: bytes in train 486, dev 27, test 27)
    """
    name = str(source)
    if name == "python_source":
        from fullrank.datasets.python_source import python_source

        return python_source()
    if name in _COLLECTIONS and not Path(source).exists():
        return _COLLECTIONS[name](_data_folder(name))
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"), field_name)
    path = Path(source)
    if path.is_file():
        return Texts.divided(path.stem, _documents(path, field_name), source=path.name)
    if path.is_dir():
        return _from_folder(path, field_name)
    raise InputError(
        f"no texts at {name!r}; expected python_source, {', '.join(_COLLECTIONS)}, a text or JSONL "
        "file, a folder of them, or hf:NAME"
    )


def _documents(path: Path, field_name: str) -> list[str]:
    """Texts of a file: a field of each JSON line, or all of it."""
    if path.suffix.lower() == ".jsonl":
        return [
            _field(record, field_name, f"{path}, line {number}")
            for number, record in read_objects(path)
        ]
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}); convert it") from error


def _field(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise InputError(f"{where}: no field {name!r} among {sorted(record)}")
    text = record[name]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise InputError(f"{where}: the field {name!r} is {kind}, not text")
    return checked_text(text, name, where)


def checked_text(text: str, name: str, where: str) -> str:
    """Return the text of a field; raise where no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: the field {name!r} holds half of a surrogate pair, which no tokenizer "
            "reads; remove it"
        ) from None
    return text


def _from_folder(folder: Path, field_name: str) -> Texts:
    files: dict[str, list[Path]] = {}
    stems = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}
    for stem, part in stems.items():
        if found := sorted(folder.glob(f"{stem}.*")):
            files.setdefault(part, []).extend(found)
    # A train file alone is one of a folder of sources, as likely as not.
    if {"train"} < files.keys():
        parts = {part: _joined(paths, field_name) for part, paths in files.items()}
        return _in_parts(folder.name, parts, folder.name)
    documents = [text for path in _text_files(folder) for text in _documents(path, field_name)]
    if not documents:
        raise InputError(f"{folder} holds no .txt, .md, .jsonl or .py file")
    return Texts.divided(folder.name, documents, source=folder.name)


def _joined(paths: Sequence[Path], field_name: str) -> tuple[str, ...]:
    """Texts of a part, whose files are numbered (train.1.txt) where it has several."""
    first = paths[0]
    for path in paths[1:]:
        # As likely as not the same texts once more.
        if path.suffix != first.suffix or path.name.split(".")[0] != first.name.split(".")[0]:
            raise InputError(f"{first} and {path} are of one part: which is it? Take one away")
    return tuple(text for path in paths for text in _documents(path, field_name))


def _text_files(folder: Path) -> list[Path]:
    """Files under a folder that is not in parts, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".txt", ".md", ".jsonl", ".py")
        and path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    ]


def _in_parts(name: str, parts: Mapping[str, tuple[str, ...]], source: str) -> Texts:
    """Texts that come in parts; where none is for dev, one is cut off the training part."""
    if "dev" not in parts:
        rest = {part: texts for part, texts in parts.items() if part != "train"}
        parts = {**Texts.divided(name, parts["train"]).parts, **rest}
    return Texts(name, parts, {"source": source})


def _from_hub(name: str, column: str) -> Texts:
    library = require("datasets", extra="hf")
    path, _, config = name.partition(":")
    try:
        loaded = library.load_dataset(path, config or None)
    except Exception as error:
        raise InputError(f"the data set {name!r} cannot be loaded: {error}") from error
    found: dict[str, tuple[str, ...]] = {}
    splits = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
    for split, part in splits.items():
        if split in loaded:
            if column not in loaded[split].column_names:
                raise InputError(
                    f"{name} has no column {column!r}, but {loaded[split].column_names}"
                )
            texts = (str(text) for text in loaded[split][column] if text is not None)
            found.setdefault(part, tuple(texts))
    if "train" not in found:
        raise InputError(f"{name} has no split 'train'; it has {', '.join(loaded)}")
    return _in_parts(path, found, f"hf:{name}")


def _data_folder(name: str) -> Path:
    data = os.environ.get("FULLRANK_DATA")
    if not data:
        raise InputError(
            f"{name} is not part of the package: set the environment variable FULLRANK_DATA to the "
            "folder that holds it, or give a file"
        )
    return Path(data)


def _shakespeare(data: Path) -> Texts:
    return read_texts(data / "tinyshakespeare.txt")


def _wikitext(data: Path) -> Texts:
    """Its training part is not there: the validation text is divided, the test text kept."""
    folder = data / "wikitext-2"
    parts = {
        "train": tuple(_documents(folder / "valid.txt", "text")),
        "test": tuple(_documents(folder / "test.txt", "text")),
    }
    return _in_parts("wikitext-2", parts, "wikitext-2")


def _gsm8k(data: Path) -> Texts:
    def read(name: str) -> tuple[str, ...]:
        rows = read_objects(data / "gsm8k" / f"{name}.jsonl")
        return tuple(f"Question: {r['question']}\nAnswer: {r['answer']}\n" for _, r in rows)

    train = read("train")
    held = len(train) // 20
    parts = {"train": train[:-held], "dev": train[-held:], "test": read("test")}
    return Texts("gsm8k", parts, {"source": "gsm8k"})


_COLLECTIONS: dict[str, Callable[[Path], Texts]] = {
    "tinyshakespeare": _shakespeare,
    "wikitext-2": _wikitext,
    "gsm8k": _gsm8k,
}
