"""Training pairs for retrieval: a query, a document judged relevant, documents that are not."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullrank.core.errors import InputError
from fullrank.core.progress import progress as progress_bar

if TYPE_CHECKING:
    from fullrank.core.corpus import Corpus
    from fullrank.datasets import Dataset

# Candidates that BM25 gives for the hard negatives of one query.
_DEPTH = 50
# Queries that BM25 answers between two updates of the bar.
_BLOCK = 256
# Word sets that overlap by so much (Jaccard) belong to documents that say the same.
_SAME = 0.8


@dataclass(frozen=True)
class TrainingPairs:
    """What a contrastive loss learns from, by row.

    Attributes
    ----------
    corpus
        The documents.
    queries
        Query texts.
    rows
        One tuple a pair: row of the query, row of the relevant document, rows of hard negatives.
    forbidden
        For each query, the documents that are never its negatives: its own, those judged
        relevant, those whose own query it answers, and copies of all these.
    """

    corpus: Corpus
    queries: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    forbidden: tuple[frozenset[int], ...]

    def __len__(self) -> int:
        return len(self.rows)


def make_pairs(
    dataset: Dataset,
    *,
    hard_negatives: int = 1,
    max_pairs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TrainingPairs:
    """Turn judgements into training pairs with hard negatives from BM25.

    Parameters
    ----------
    dataset
        Queries with judgements; grades of at least 1 are relevant. A query's ``exclude`` names
        the documents it was made from.
    hard_negatives
        Documents a pair, drawn from the best 50 of BM25 that are not forbidden and not nearly
        the same as the query's own or relevant documents (Jaccard of word sets at least 0.8).
        A query for which BM25 finds too few gets random documents.
    max_pairs
        Draw so many pairs at random where there are more.
    seed
        Of every draw.
    progress
        Show a bar while BM25 runs.

    Raises
    ------
    InputError
        When there are fewer than two pairs to learn from.

    Examples
    --------
    >>> from fullrank.core import Corpus
    >>> from fullrank.datasets import Dataset
    >>> data = Dataset("fruit", Corpus(["a", "b", "c"], ["red apple", "pear", "green apple"]),
    ...                {"q": "apple", "r": "green pear"}, {"q": {"a": 1}, "r": {"b": 1}})
    >>> make_pairs(data).rows
    ((0, 0, 2), (1, 1, 2))
    """
    draw = random.Random(seed)
    positives = _positives(dataset)
    pairs = [(query, row) for query, rows in positives.items() for row in rows]
    if max_pairs is not None and len(pairs) > max_pairs:
        pairs = [pairs[i] for i in sorted(draw.sample(range(len(pairs)), max_pairs))]
    if len(pairs) < 2:
        raise InputError(
            f"{dataset.name} gives {len(pairs)} training pairs; it needs at least two queries "
            "with a document judged relevant (a grade of 1 or more)"
        )
    kept = list(dict.fromkeys(query for query, _ in pairs))
    number = {query: i for i, query in enumerate(kept)}
    forbidden = _forbidden(dataset, kept, positives)
    rows: list[tuple[int, ...]] = [(number[query], row) for query, row in pairs]
    if hard_negatives:
        pools = _candidates(dataset, kept, forbidden, progress)
        rows = _with_negatives(rows, pools, forbidden, len(dataset.corpus), hard_negatives, draw)
    texts = tuple(dataset.queries[query] for query in kept)
    return TrainingPairs(dataset.corpus, texts, tuple(rows), forbidden)


def _positives(dataset: Dataset) -> dict[str, list[int]]:
    """Query -> rows of its relevant documents, without its own."""
    corpus = dataset.corpus
    found: dict[str, list[int]] = {}
    for query in dataset.queries:
        own = set(dataset.exclude.get(query, ()))
        rows = [
            corpus.row(document)
            for document, grade in dataset.qrels.get(query, {}).items()
            if grade >= 1 and document in corpus and document not in own
        ]
        if rows:
            found[query] = rows
    return found


def _rows(corpus: Corpus, documents: Iterable[str]) -> set[int]:
    return {corpus.row(document) for document in documents if document in corpus}


def _forbidden(
    dataset: Dataset, queries: Sequence[str], positives: Mapping[str, Sequence[int]]
) -> tuple[frozenset[int], ...]:
    corpus = dataset.corpus
    own = {query: _rows(corpus, dataset.exclude.get(query, ())) for query in positives}
    # Row of a document -> the documents whose queries it answers.
    answers: dict[int, set[int]] = defaultdict(set)
    for query, rows in positives.items():
        for row in rows:
            answers[row] |= own[query]
    copies: dict[str, set[int]] = defaultdict(set)
    for row, contents in enumerate(corpus.contents):
        copies[contents].add(row)
    # Queries of equal text are one query with more relevant documents.
    by_text: dict[str, set[int]] = defaultdict(set)
    for query, rows in positives.items():
        closed = own[query] | set(rows)
        for row in own[query]:
            closed |= answers[row]
        for row in tuple(closed):
            closed |= copies[corpus.contents[row]]
        by_text[dataset.queries[query]] |= closed
    return tuple(frozenset(by_text[dataset.queries[query]]) for query in queries)


def _candidates(
    dataset: Dataset, queries: Sequence[str], forbidden: Sequence[frozenset[int]], progress: bool
) -> list[list[int]]:
    """Rows that BM25 ranks high for each query and that may be its negatives, best first."""
    from fullrank.retrieval import BM25

    corpus = dataset.corpus
    search = BM25(corpus, depth=_DEPTH)
    words: dict[int, frozenset[str]] = {}

    def words_of(row: int) -> frozenset[str]:
        if row not in words:
            words[row] = frozenset(corpus.contents[row].lower().split())
        return words[row]

    pools = []
    with progress_bar("hard negatives", len(queries), progress, unit="queries") as advance:
        for start in range(0, len(queries), _BLOCK):
            block = queries[start : start + _BLOCK]
            run = search({query: dataset.queries[query] for query in block})
            for i, query in enumerate(block, start):
                near = [words_of(row) for row in forbidden[i]]
                found = (corpus.row(document) for document in run[query].ids)
                pools.append(
                    [
                        row
                        for row in found
                        if row not in forbidden[i] and not _same(words_of(row), near)
                    ]
                )
            advance(len(block))
    return pools


def _same(words: frozenset[str], others: Iterable[frozenset[str]]) -> bool:
    return any(len(words & other) >= _SAME * len(words | other) for other in others)


def _with_negatives(
    rows: Sequence[tuple[int, ...]],
    pools: Sequence[Sequence[int]],
    forbidden: Sequence[frozenset[int]],
    documents: int,
    count: int,
    draw: random.Random,
) -> list[tuple[int, ...]]:
    # The pairs of one query share its pool, so that they get different negatives while it lasts.
    shuffled = [draw.sample(pool, len(pool)) for pool in pools]
    given = [0] * len(pools)
    out = []
    for query, positive in rows:
        chosen: list[int] = []
        pool = shuffled[query]
        while len(chosen) < min(count, len(pool)):
            chosen.append(pool[given[query] % len(pool)])
            given[query] += 1
        chosen = list(dict.fromkeys(chosen))
        chosen += _random_rows(count - len(chosen), {*chosen, *forbidden[query]}, documents, draw)
        out.append((query, positive, *chosen))
    return out


def _random_rows(count: int, taken: set[int], documents: int, draw: random.Random) -> list[int]:
    if not count:
        return []
    if documents - len(taken) < count:
        raise InputError(
            f"the corpus has {documents} documents, too few for {count} more hard negatives of a "
            "query; ask for fewer (hard_negatives=0 takes only those in the batch)"
        )
    found: list[int] = []
    while len(found) < count:
        row = draw.randrange(documents)
        if row not in taken:
            taken.add(row)
            found.append(row)
    return found
