"""`pydocs`: a search collection made of the documentation on this machine."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.docstrings.corpus import Documented, read_packages
from fullrank.datasets.docstrings.duplicates import Groups, near_identical
from fullrank.datasets.docstrings.packages import (
    Package,
    default_packages,
    every_package,
    find_packages,
)
from fullrank.datasets.docstrings.see_also import plain
from fullrank.datasets.docstrings.split import SHARES, components, split_documents

QUICK_DOCUMENTS = 300
QUICK_QUERIES = 75


def pydocs(
    packages: Sequence[str] | None = None,
    *,
    size: int | None = 3500,
    every: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> Dataset:
    """Make a search collection from the docstrings of installed Python packages.

    Sources are parsed, never imported. A document is a function, class or method with a
    docstring: its title the shortest public name, its text the docstring without the See Also
    section. A query is the summary line of a document with such a section; relevant (grade 1)
    are the documents named there, looked up inside the same package; names that could mean
    several documents are dropped, and so are queries whose summary another document repeats.
    The query's own document and near copies of it are in ``exclude``, never judged. Parts are
    made of connected components of the See Also graph, so that nothing learnt on ``train``
    (a pair, its reverse, a near copy) is asked for in ``test``.

    Parameters
    ----------
    packages
        Names as one installs or imports them; by default those of numpy, scipy, scikit-learn
        and networkx that are installed.
    size
        Documents to keep: those with a query or a judgement always, the rest drawn at random.
        None keeps all. 3,500 by default.
    every
        Take every installed package instead, and keep all documents.
    quick
        At most 300 documents of the first package, for trying things out.
    seed
        Of the draw and of the split.

    Returns
    -------
    Dataset
        With ``exclude``, ``clusters`` (the module that defines the query's document), ``parts``
        and a manifest of versions, counts and the SHA-256 of the corpus.

    Raises
    ------
    InputError
        When a package is not installed, none has documents, or the arguments contradict.

    Examples
    --------
    >>> data = pydocs(quick=True)
    >>> sorted(data.parts)
    ['dev', 'test', 'train']
    """
    if every and (packages is not None or quick):
        raise InputError("every=True takes all packages; leave out packages= and quick=")
    if size is not None and size < 1:
        raise InputError(f"size={size}; expected a positive number of documents, or None for all")
    chosen = _choose(packages, every)
    if quick:
        chosen = chosen[:1]
    documents = read_packages(chosen, bar=every)
    if not documents:
        raise InputError(f"no docstrings in {', '.join(p.name for p in chosen)}")
    draft = _Draft(documents, seed)
    if quick:
        draft.keep_components(QUICK_QUERIES)
    draft.split()
    limit = None if every else size
    if quick:
        limit = min(limit or QUICK_DOCUMENTS, QUICK_DOCUMENTS)
    return draft.dataset(chosen, draft.sample(limit))


def _choose(packages: Sequence[str] | None, every: bool) -> list[Package]:
    if every:
        return every_package()
    if packages is None:
        return default_packages()
    if isinstance(packages, str) or not packages:
        raise InputError(f"packages={packages!r}; expected a list of names, e.g. ['numpy']")
    return find_packages(packages)


@dataclass
class _Draft:
    """A collection in the making; documents are numbers into a list sorted by title."""

    documents: list[Documented]
    seed: int
    judged: dict[int, list[int]] = field(init=False)
    twins: list[tuple[int, int]] = field(init=False)
    copies: dict[int, list[int]] = field(init=False)
    """Document -> those with (nearly) its text, itself among them."""
    part: dict[int, str] = field(default_factory=dict)
    crossing: int = 0
    """Judgements dropped because their two documents are in different parts."""

    def __post_init__(self) -> None:
        self.twins = near_identical([d.parts.text for d in self.documents])
        groups = Groups(len(self.documents))
        for a, b in self.twins:
            groups.join(a, b)
        members: dict[int, list[int]] = {}
        for row in range(len(self.documents)):
            members.setdefault(groups.find(row), []).append(row)
        self.copies = {row: group for group in members.values() for row in group}
        self.judged = self._judgements()

    def _judgements(self) -> dict[int, list[int]]:
        rows = {document.title: row for row, document in enumerate(self.documents)}
        summaries = [_key(document.parts.summary) for document in self.documents]
        repeated = Counter(summaries)
        found = {}
        for row, document in enumerate(self.documents):
            if not summaries[row] or repeated[summaries[row]] > 1:
                continue
            own = set(self.copies[row])
            if targets := [t for name in document.related if (t := rows[name]) not in own]:
                found[row] = targets
        return found

    def keep_components(self, queries: int) -> None:
        """Keep whole components, drawn at random, until there are so many queries."""
        groups = sorted(components(self.judged, self.twins, len(self.documents)).values())
        random.Random(self.seed).shuffle(groups)
        kept: list[int] = []
        for group in groups:
            # A large one would leave nothing to divide among three parts.
            if len(kept) < queries and len(group) <= queries // 6:
                kept += group
        self.judged = {q: self.judged[q] for q in sorted(kept or self.judged)}

    def split(self) -> None:
        """Divide into parts, and drop what then crosses them."""
        self.part = split_documents(
            self.judged, self.twins, len(self.documents), shares=SHARES, seed=self.seed
        )
        before = sum(map(len, self.judged.values()))
        inside = {
            q: [d for d in documents if self.part[d] == self.part[q]]
            for q, documents in self.judged.items()
        }
        self.judged = {q: documents for q, documents in inside.items() if documents}
        self.crossing = before - sum(map(len, self.judged.values()))

    def sample(self, size: int | None) -> list[int]:
        """Rows of the documents to keep, sorted."""
        needed = {*self.judged, *(d for documents in self.judged.values() for d in documents)}
        rest = [row for row in range(len(self.documents)) if row not in needed]
        if size is not None:
            rest = random.Random(self.seed).sample(rest, min(max(size - len(needed), 0), len(rest)))
        return sorted([*needed, *rest])

    def dataset(self, packages: Sequence[Package], rows: Sequence[int]) -> Dataset:
        """Put the rows kept and their queries together."""
        title = [document.title for document in self.documents]
        kept = set(rows)
        corpus = Corpus(
            [title[row] for row in rows],
            [self.documents[row].parts.text for row in rows],
            titles=[title[row] for row in rows],
            metadata=[
                {"package": title[row].partition(".")[0], "module": self.documents[row].module}
                for row in rows
            ],
        )
        parts = {
            part: tuple(title[q] for q in self.judged if self.part[q] == part) for part in SHARES
        }
        return Dataset(
            name="pydocs",
            corpus=corpus,
            queries={title[q]: plain(self.documents[q].parts.summary) for q in self.judged},
            qrels={title[q]: {title[d]: 1 for d in ds} for q, ds in self.judged.items()},
            exclude={
                title[q]: tuple(title[d] for d in self.copies[q] if d in kept) for q in self.judged
            },
            clusters={title[q]: self.documents[q].module for q in self.judged},
            parts=parts,
            manifest=self._manifest(packages, corpus, parts),
        )

    def _manifest(
        self,
        packages: Sequence[Package],
        corpus: Corpus,
        parts: Mapping[str, tuple[str, ...]],
    ) -> dict[str, Any]:
        return {
            "name": "pydocs",
            "packages": {package.name: package.version for package in sorted(packages)},
            "documents": len(corpus),
            "documents_found": len(self.documents),
            "queries": len(self.judged),
            "judgements": sum(map(len, self.judged.values())),
            "judgements_dropped_between_parts": self.crossing,
            "parts": {part: len(queries) for part, queries in parts.items()},
            "seed": self.seed,
            "sha256": corpus.fingerprint,
        }


def _key(summary: str) -> str:
    """What makes two summaries the same: their words."""
    return " ".join(re.findall(r"\w+", summary.lower()))
