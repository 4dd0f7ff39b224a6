"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``."""

from __future__ import annotations

from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.jsonl import jsonl
from fullrank.datasets.judgements import read_qrels
from fullrank.datasets.query_files import collect_queries, query_objects
from fullrank.datasets.reading import Errors, find_file


def beir(folder: str | Path, split: str = "test", *, errors: Errors = "strict") -> Dataset:
    r"""Read a collection in the layout of the BEIR benchmark; its files may be compressed (.gz).

    Parameters
    ----------
    folder
        Holds ``corpus.jsonl``, ``queries.jsonl`` and the folder ``qrels``.
    split
        Name of the judgement file: ``qrels/test.tsv`` by default. Only queries judged there
        are kept.
    errors
        ``"replace"`` reads files that are not UTF-8 throughout.

    Raises
    ------
    InputError
        When a file is absent or malformed, or judges a query that is not among the queries.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "qrels").mkdir()
    >>> _ = (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "Rank."}')
    >>> _ = (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what has rank"}')
    >>> _ = (folder / "qrels" / "test.tsv").write_text("query-id corpus-id score\nq1 d1 1")
    >>> beir(folder).qrels
    {'q1': {'d1': 1}}
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    if not is_beir(root):
        raise InputError(f"{root} is no BEIR folder: it has no corpus.jsonl (nor corpus.jsonl.gz)")
    qrels = read_qrels(_split_file(root, split))
    file = find_file(root / "queries.jsonl")
    queries = collect_queries(query_objects(file, errors), file, qrels)
    if unknown := qrels.keys() - queries.keys():
        raise InputError(
            f"{root}: qrels/{split}.tsv judges {len(unknown)} queries that are not in "
            f"queries.jsonl, e.g. {min(unknown)!r}"
        )
    return Dataset(
        name=root.resolve().name,
        corpus=jsonl(root / "corpus.jsonl", errors=errors),
        queries=queries,
        qrels=qrels,
        manifest={"name": root.resolve().name, "format": "BEIR", "split": split},
    )


def is_beir(folder: Path) -> bool:
    """Whether a folder looks like one of BEIR's."""
    return any((folder / f"corpus.jsonl{suffix}").is_file() for suffix in ("", ".gz"))


def _split_file(root: Path, split: str) -> Path:
    for suffix in ("", ".gz"):
        if (file := root / "qrels" / f"{split}.tsv{suffix}").is_file():
            return file
    there = sorted({f.name.partition(".")[0] for f in root.glob("qrels/*.tsv*")})
    raise InputError(
        f"{root} has no judgements for the split {split!r}; "
        + (f"there are {', '.join(there)}" if there else "it has no qrels/*.tsv at all")
    )
