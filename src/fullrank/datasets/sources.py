"""What a user writes on the command line, read: a file, a folder, or a name with a prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.beir import beir, is_beir
from fullrank.datasets.builtin import cranfield, vaswani
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.docstrings.build import pydocs
from fullrank.datasets.huggingface import from_huggingface
from fullrank.datasets.ir_datasets_ids import from_ir_datasets
from fullrank.datasets.jsonl import jsonl
from fullrank.datasets.reading import Errors, read_lines
from fullrank.datasets.text_folder import text_folder
from fullrank.datasets.trec import trec_documents
from fullrank.datasets.tsv import tsv

_NAMED: dict[str, Callable[[], Dataset]] = {
    "pydocs": pydocs,
    "cranfield": cranfield,
    "vaswani": vaswani,
}
# What these begin with, a brace or a tag, tells nothing.
_MARKED_UP = (".md", ".markdown", ".rst")
_TREC = re.compile(r"<doc(s|uments?)?[\s>]|<\?xml", re.IGNORECASE)
_FORMS = (
    "a .jsonl, .tsv, TREC or text file, a folder of text files or in BEIR's layout, 'pydocs', "
    "'cranfield', 'vaswani', 'ir_datasets:ID' or 'hf:NAME'"
)


def read_corpus(source: str | Path, *, errors: Errors = "strict") -> Corpus:
    r"""Read documents from wherever a name points to.

    Parameters
    ----------
    source
        A file (JSON lines, tab-separated, TREC, plain text or Markdown; told by its ending,
        ``.gz`` allowed), a folder (BEIR or text files), ``"pydocs"``, ``"cranfield"``,
        ``"vaswani"``, ``"ir_datasets:ID"`` or ``"hf:NAME"``. A file or folder that exists goes
        before a name.
    errors
        ``"replace"`` reads files that are not UTF-8 throughout.

    Raises
    ------
    InputError
        When there is no such thing, or it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "docs.tsv"
    >>> _ = file.write_text("1\ta text")
    >>> read_corpus(file)
    Corpus(1 documents)
    """
    path = Path(source)
    if path.is_dir() and is_beir(path):
        return jsonl(path / "corpus.jsonl", errors=errors)
    if path.is_dir():
        collection = _folder(path, "test")
        return text_folder(path, errors=errors) if collection is None else collection.corpus
    if path.is_file():
        return _file(path, errors)
    if (named := _by_name(str(source))) is not None:
        return named.corpus
    raise InputError(f"there is no file, folder or collection {str(source)!r}; expected {_FORMS}")


def read_dataset(source: str | Path, *, split: str = "test") -> Dataset:
    """Read documents, queries and judgements from wherever a name points to.

    Parameters
    ----------
    source
        ``"pydocs"``, ``"cranfield"``, ``"vaswani"``, a folder in BEIR's layout or with the
        files of Cranfield or Vaswani, ``"ir_datasets:ID"`` or ``"hf:NAME"``.
    split
        Of a BEIR folder: which judgements.

    Raises
    ------
    InputError
        When there is no such thing, or it has no judgements.
    """
    path = Path(source)
    found = _folder(path, split) if path.is_dir() else None
    found = found or _by_name(str(source))
    if found is None:
        raise InputError(
            f"{str(source)!r} is no collection with queries and judgements; expected 'pydocs', "
            "'cranfield', 'vaswani', a folder in BEIR's layout, 'ir_datasets:ID' or 'hf:NAME'"
        )
    if not found.qrels:
        raise InputError(f"{found.name} has documents but no judgements")
    return found


def _folder(path: Path, split: str) -> Dataset | None:
    """A folder told by the files in it."""
    if is_beir(path):
        return beir(path, split)
    if (path / "doc-text.trec").is_file():
        return vaswani(path)
    return cranfield(path) if (path / "cran.qry.xml").is_file() else None


def _by_name(source: str) -> Dataset | None:
    prefix, colon, rest = source.partition(":")
    if colon and prefix == "ir_datasets":
        return from_ir_datasets(rest)
    if colon and prefix == "hf":
        return from_huggingface(rest)
    reader = _NAMED.get(source)
    return None if reader is None else reader()


def _file(path: Path, errors: Errors) -> Corpus:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return jsonl(path, errors=errors)
    if name.endswith(".tsv"):
        return tsv(path, errors=errors)
    if name.endswith(_MARKED_UP) and path.suffix != ".gz":
        return text_folder(path, errors=errors)
    first = next((line for _, line in read_lines(path, errors) if line.strip()), "").lstrip()
    plain = name.endswith((".txt", ".text")) and path.suffix != ".gz"
    if _TREC.match(first):
        return trec_documents(path, errors=errors)
    if first.startswith("{") and (_is_json(first) or not plain):
        return jsonl(path, errors=errors)
    if plain:
        return text_folder(path, errors=errors)
    raise InputError(f"{path} is in no form that can be told; expected {_FORMS}")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
