"""A small index that behaves like the real one, without a model; run as a script, served.

`python serve_fakes.py [SECONDS] [plain|encoders]` serves it on a free port; searches by the default
system take so long at least.
"""

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fullrank.core import Corpus, Run, StageTrace
from fullrank.core.observe import stage_finished

WORD = re.compile(r"\w+")
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"


class WordStage:
    """Scores documents by how many of the query's words they hold."""

    def __init__(self, corpus: Corpus, name: str, weight: float) -> None:
        self.corpus, self.name, self.weight = corpus, name, weight

    def __call__(self, queries: Mapping[str, str]) -> Run:
        scores = {
            query: {
                document.id: self.weight * count
                for document in self.corpus
                if (count := self.count(text, document.contents))
            }
            for query, text in queries.items()
        }
        run = Run.from_dict(scores, name=self.name).traced(self.name, 0.25)
        stage_finished(self.name, run)
        return run

    @staticmethod
    def count(query: str, text: str) -> int:
        words = WORD.findall(text.lower())
        return sum(words.count(word) for word in WORD.findall(query.lower()))


class SumStage:
    """Two stages, and the sum of their scores."""

    def __init__(self, name: str, *parts: WordStage) -> None:
        self.name, self.parts = name, parts

    def __call__(self, queries: Mapping[str, str]) -> Run:
        runs = [part(queries) for part in self.parts]
        totals: dict[str, dict[str, float]] = {query: {} for query in queries}
        for run in runs:
            for query, ranking in run.items():
                for document, score in ranking:
                    totals[query][document] = totals[query].get(document, 0.0) + score
        trace = [StageTrace(*stage) for run in runs for stage in run.trace]
        run = Run.from_dict(totals, name=self.name).traced(self.name, 0.5, trace)
        stage_finished(self.name, run)
        return run


class Snippet(str):
    """A string that knows which of its parts are words of the query."""

    highlights: list[tuple[int, int]]


class FakeIndex:
    """The protocol that `fullrank.serve` asks for, over a few documents."""

    default_system = "both"
    encoders: Mapping[str, object] = {}

    def __init__(self, encoders: bool = False) -> None:
        titles = {
            "numpy.linalg.svd": "Singular value decomposition of a matrix.",
            "scipy.sparse.linalg.svds": "Partial singular value decomposition of a sparse matrix.",
            "scipy.optimize.linear_sum_assignment": "Solve the linear sum assignment problem.",
            "scipy.spatial.distance.pdist": "Pairwise distances of observations 𝒳 in a matrix.",
        }
        ids, texts = list(titles), list(titles.values())
        ids += ["attack", "surrogate", "long", "untitled"]
        texts += [
            f"evil {ATTACK}",
            "broken \ud800 text",
            "word " * 50_000,
            "a matrix without title",
        ]
        names = [*titles, f"Evil {ATTACK}", "Broken \udfff title", "x" * 300, ""]
        ids += [f"filler.{i}" for i in range(30)]
        texts += [f"Filler number {i} of the filler documents" for i in range(30)]
        names += [f"filler.{i}" for i in range(30)]
        self.corpus = Corpus(ids, texts, names)
        words, meaning = WordStage(self.corpus, "bm25", 2.0), WordStage(self.corpus, "dense", 0.1)
        self.systems = {"both": SumStage("both", words, meaning), "bm25": words, "dense": meaning}
        if encoders:
            tuned = WordStage(self.corpus, "dense", 0.7)
            self.default_system = "bm25"
            self.systems = {"bm25": words, "dense": meaning, "dense:tuned": tuned}
            self.encoders = {"base": None, "tuned": None}

    def search(self, query: str, k: int, *, system: str) -> Run:
        return self.systems[system]({"q": query}).top(k)

    def snippets(self, query: str, documents: list[str], *, system: str) -> list[Snippet]:
        return [self.snippet(query, document) for document in documents]

    def snippet(self, query: str, document: str) -> Snippet:
        snippet = Snippet(self.corpus[document].text[:700])
        wanted = set(WORD.findall(query.lower()))
        snippet.highlights = [m.span() for m in WORD.finditer(snippet) if m[0].lower() in wanted]
        return snippet


def main(pause: str = "0", kind: str = "plain") -> None:
    from fullrank.serve import create_app
    from fullrank.serve.server import listen, run

    index = FakeIndex(encoders=kind == "encoders")
    inner = index.systems[index.default_system]

    def slow(queries: Mapping[str, str]) -> Run:
        time.sleep(float(pause))
        return inner(queries)

    index.systems[index.default_system] = slow
    listener = listen("127.0.0.1", 0)
    xray = Path(__file__).with_name("xray.html")
    app = create_app(index, xray_html=xray, concurrency=2, queue=8)
    run(app, listener, f"http://127.0.0.1:{listener.getsockname()[1]}/")


if __name__ == "__main__":
    main(*sys.argv[1:])
