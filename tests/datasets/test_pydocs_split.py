"""Near-identical texts, and parts that share nothing."""

import random
from collections import Counter

import pytest

from fullrank.datasets.docstrings.duplicates import Groups, near_identical
from fullrank.datasets.docstrings.split import components, split_documents


def brute_force(texts, threshold, width=5):
    def shingles(text):
        words = text.lower().split()
        width_here = max(1, min(width, len(words)))
        return {tuple(words[i : i + width_here]) for i in range(len(words) - width_here + 1)}

    sets = [shingles(t) for t in texts]
    return [
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])
    ]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_identical_finds_exactly_the_pairs(threshold):
    random.seed(0)
    words = [f"w{i}" for i in range(30)]
    texts = []
    for _ in range(40):
        base = random.choices(words, k=random.randint(5, 60))
        texts.append(" ".join(base))
        for _ in range(random.randint(0, 2)):
            base[random.randrange(len(base))] = random.choice(words)
            texts.append(" ".join(base))
    texts = list(dict.fromkeys(texts))
    assert near_identical(texts, threshold=threshold) == sorted(brute_force(texts, threshold))


def test_near_identical_on_short_and_equal_texts():
    texts = ["Fit the model.", "fit, the MODEL", "Fit a model.", "", "", "one two three four five"]
    assert near_identical(texts) == [(0, 1), (3, 4)]
    assert near_identical([]) == []
    assert near_identical([""]) == []


def test_groups():
    groups = Groups(5)
    for a, b in [(3, 4), (1, 3), (4, 1)]:
        groups.join(a, b)
    assert [groups.find(i) for i in range(5)] == [0, 1, 2, 1, 1]


def chain(start, length):
    """Queries that each name the next document."""
    return {i: [i + 1] for i in range(start, start + length)}


def test_components_are_kept_whole_and_twins_together():
    judged = {k: v for start in range(0, 200, 10) for k, v in chain(start, 4).items()}
    twins = [(4, 14), (5, 21)]
    part = split_documents(judged, twins, 200)
    for members in components(judged, twins, 200).values():
        assert len({part[d] for q in members for d in (q, *judged[q])}) == 1
    assert part[4] == part[14]
    # 5 has no judgement and so no part; its twin has one.
    assert 5 not in part
    counts = Counter(part[q] for q in judged)
    assert counts == {"train": 24, "dev": 20, "test": 36}


def test_a_large_component_is_cut_into_communities():
    judged = {}
    for start in range(0, 400, 20):
        inner = range(start, start + 20)
        judged |= {i: [j for j in inner if j != i] for i in inner}
        judged[start].append((start + 20) % 400)  # a bridge to the next clique
    twins = [(3, 25)]
    part = split_documents(judged, twins, 400, seed=1)
    assert part[3] == part[25]
    crossing = sum(part[q] != part[d] for q, ds in judged.items() for d in ds)
    assert 0 < crossing < 100  # of 7,600: bridges, and what the twins hold together
    assert set(part.values()) == {"train", "dev", "test"}
    assert split_documents(judged, twins, 400, seed=1) == part


def test_the_seed_draws_another_split():
    judged = {i: [i + 1] for i in range(0, 300, 2)}
    assert split_documents(judged, [], 300, seed=0) != split_documents(judged, [], 300, seed=1)


def test_one_component_that_cannot_be_cut():
    part = split_documents({i: [0] for i in range(1, 9)}, [], 9)
    assert set(part) == set(range(9))
