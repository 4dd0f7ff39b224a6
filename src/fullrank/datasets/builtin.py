"""Two small classic test collections, read from a folder that the user has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.judgements import read_qrels
from fullrank.datasets.topics import read_topics
from fullrank.datasets.trec import trec, trec_documents


def vaswani(folder: str | Path | None = None) -> Dataset:
    """Read the Vaswani (NPL) collection: 11,429 abstracts, 93 queries.

    Parameters
    ----------
    folder
        Holds ``doc-text.trec``, ``query-text.trec`` and ``qrels``; by default the folder
        ``vaswani`` in the one that the environment variable ``FULLRANK_DATA`` names.

    Raises
    ------
    InputError
        When the folder or one of its files is absent.
    """
    files = _files("vaswani", folder, ("doc-text.trec", "query-text.trec", "qrels"))
    return trec(*files, name="vaswani")


def cranfield(folder: str | Path | None = None) -> Dataset:
    """Read the Cranfield collection: 1,400 abstracts, 225 queries.

    The judgements number the queries 1 to 225 in the order of the query file, whatever the
    ``<num>`` in it says; so do the query ids here.

    Parameters
    ----------
    folder
        Holds ``cran.all.1400.xml``, ``cran.qry.xml`` and ``cranqrel.trec.txt``; by default the
        folder ``cranfield`` in the one that the environment variable ``FULLRANK_DATA`` names.

    Raises
    ------
    InputError
        When the folder or one of its files is absent.
    """
    names = ("cran.all.1400.xml", "cran.qry.xml", "cranqrel.trec.txt")
    documents, topics, judgements = _files("cranfield", folder, names)
    corpus = trec_documents(documents)
    texts = list(read_topics(topics).values())
    queries = {str(number): text for number, text in enumerate(texts, 1)}
    qrels = read_qrels(judgements)
    if unknown := qrels.keys() - queries.keys():
        raise InputError(
            f"{judgements} judges query {min(unknown)!r}, but {topics} has {len(queries)} queries"
        )
    return Dataset(
        name="cranfield",
        corpus=corpus,
        queries={q: text for q, text in queries.items() if q in qrels},
        qrels=qrels,
        manifest={"name": "cranfield", "format": "TREC", "sha256": corpus.fingerprint},
    )


def _files(name: str, folder: str | Path | None, files: Sequence[str]) -> list[Path]:
    """Paths of a collection's files, all of them there."""
    if folder is None:
        data = os.environ.get("FULLRANK_DATA")
        if not data:
            raise InputError(
                f"{name} is not part of the package: pass its folder, or set the environment "
                f"variable FULLRANK_DATA to the folder that holds {name}/"
            )
        folder = Path(data) / name
    root = Path(folder)
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        raise InputError(f"{root} lacks {', '.join(missing)}; expected the files of {name}")
    return [root / file for file in files]
