"""A toy collection whose judgements a tiny encoder can learn in a few steps."""

import random

from fullrank.core import Corpus
from fullrank.datasets import Dataset

TOPICS = 8
WORDS = [f"{a}{b}" for a in "bcdfghkl" for b in ("ab", "el", "in", "ot", "um", "ay", "ir", "os")]


def make_toy(parts=True):
    """Documents speak in the first half of a topic's words, queries in the second."""
    draw = random.Random(0)
    ids, texts, queries, qrels, exclude = [], [], {}, {}, {}
    for topic in range(TOPICS):
        words = WORDS[8 * topic : 8 * topic + 8]
        for i in range(10):
            ids.append(f"d{topic}-{i}")
            texts.append(" ".join(draw.choices(words[:4], k=5) + draw.choices(WORDS, k=3)))
        for i in range(6):
            query = f"q{topic}-{i}"
            queries[query] = " ".join(draw.choices(words[4:], k=3))
            others = [f"d{topic}-{j}" for j in range(10) if j != i]
            qrels[query] = dict.fromkeys(draw.sample(others, 2), 1)
            exclude[query] = (f"d{topic}-{i}",)
    names = sorted(queries, key=lambda q: q[-1])
    split = {"train": tuple(names[:32]), "dev": tuple(names[32:])} if parts else {}
    return Dataset("toy", Corpus(ids, texts), queries, qrels, exclude, parts=split)
