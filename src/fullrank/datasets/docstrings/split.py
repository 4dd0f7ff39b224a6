"""Parts of a data set that share no judgement, no document and no near copy of one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fullrank.core.errors import require
from fullrank.datasets.docstrings.duplicates import Groups

SHARES = {"train": 0.30, "dev": 0.25, "test": 0.45}
"""Most queries go where something is measured: the interval of a difference shrinks with the
root of their number, while fine-tuning on a few hundred more pairs changes little."""

LARGEST = 0.10
"""A component with a larger share of the queries is cut into communities."""

Judged = Mapping[int, Sequence[int]]
"""Query's document -> documents it names."""


def components(judged: Judged, twins: Sequence[tuple[int, int]], n: int) -> dict[int, list[int]]:
    """Queries by connected component of the graph of judgements and near-identical documents.

    Parameters
    ----------
    judged
        Query's document -> documents it names; documents are numbers below ``n``.
    twins
        Pairs of near-identical documents.
    n
        Number of documents.

    Examples
    --------
    >>> components({0: [1], 2: [3], 4: [5]}, [(1, 3)], 6)
    {0: [0, 2], 4: [4]}
    """
    groups = Groups(n)
    for a, b in twins:
        groups.join(a, b)
    for query, documents in judged.items():
        for document in documents:
            groups.join(query, document)
    found: dict[int, list[int]] = defaultdict(list)
    for query in sorted(judged):
        found[groups.find(query)].append(query)
    return dict(found)


def split_documents(
    judged: Judged,
    twins: Sequence[tuple[int, int]],
    n: int,
    *,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
) -> dict[int, str]:
    """Give every document that is a query or judged to a part.

    Whole components go to one part. One with more than a tenth of the queries is cut first into
    Louvain communities; judgements may then cross parts, and the caller drops those that do.
    Near-identical documents always stay together.

    Parameters
    ----------
    judged, twins, n
        As for :func:`components`.
    shares
        Part -> share of the queries it should get.
    seed
        Of the order among equals and of the communities.

    Returns
    -------
    dict
        Document -> part.

    Examples
    --------
    >>> parts = split_documents({0: [1], 2: [3]}, [], 4, shares={"dev": 0.5, "test": 0.5})
    >>> parts[0] == parts[1], parts[2] == parts[3], parts[0] == parts[2]
    (True, True, False)
    """
    same = Groups(n)
    for a, b in twins:
        same.join(a, b)
    links: dict[int, set[int]] = defaultdict(set)
    weight: dict[int, int] = defaultdict(int)
    for query, documents in judged.items():
        node = same.find(query)
        weight[node] += 1
        links[node] |= set()
        for other in map(same.find, documents):
            links[node].add(other)
            links[other].add(node)
    whole = _connected(links)
    largest = LARGEST * len(judged)
    pieces = [p for c in whole for p in _cut(c, links, weight, largest, seed)]
    place = _assign(pieces, links, weight, shares, seed)
    used = {*judged, *(d for documents in judged.values() for d in documents)}
    return {document: place[same.find(document)] for document in sorted(used)}


def _connected(links: Mapping[int, set[int]]) -> list[list[int]]:
    """Connected components, each sorted, in order of their smallest node."""
    seen: set[int] = set()
    found = []
    for start in sorted(links):
        if start in seen:
            continue
        seen.add(start)
        members = [start]
        for node in members:
            fresh = links[node] - seen
            seen |= fresh
            members += sorted(fresh)
        found.append(sorted(members))
    return found


def _cut(
    nodes: list[int],
    links: Mapping[int, set[int]],
    weight: Mapping[int, int],
    largest: float,
    seed: int,
) -> list[list[int]]:
    """Cut a component until no piece holds more queries than ``largest``, where that can be."""
    if sum(weight.get(n, 0) for n in nodes) <= max(largest, 1):
        return [nodes]
    networkx = require("networkx", extra="search")
    graph = networkx.Graph()
    graph.add_nodes_from(nodes)  # Sorted numbers: the communities are the same in every process.
    inside = set(nodes)
    graph.add_edges_from((a, b) for a in nodes for b in sorted(links[a] & inside) if a < b)
    found = [sorted(c) for c in networkx.community.louvain_communities(graph, seed=seed)]
    if len(found) == 1:
        return found
    return [piece for part in sorted(found) for piece in _cut(part, links, weight, largest, seed)]


def _assign(
    pieces: list[list[int]],
    links: Mapping[int, set[int]],
    weight: Mapping[int, int],
    shares: Mapping[str, float],
    seed: int,
) -> dict[int, str]:
    """Fill the parts, large pieces first, neighbours together where there is room."""
    sizes = [sum(weight.get(n, 0) for n in piece) for piece in pieces]
    room = {part: share * sum(sizes) for part, share in shares.items()}
    order = list(range(len(pieces)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -sizes[i])
    place: dict[int, str] = {}
    for i in order:
        shared: dict[str, int] = defaultdict(int)
        for node in pieces[i]:
            for other in links[node]:
                if other in place:
                    shared[place[other]] += 1
        roomy = [p for p in room if room[p] >= sizes[i]] or [max(room, key=lambda p: room[p])]
        part = max(roomy, key=lambda p: (shared[p], room[p]))
        room[part] -= sizes[i]
        place |= dict.fromkeys(pieces[i], part)
    return place
