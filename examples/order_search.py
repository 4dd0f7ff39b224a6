"""Search documents by keywords and by meaning, fuse both, and ask whether it helped."""

from fullrank.datasets import pydocs
from fullrank.evaluate import compare
from fullrank.retrieval import BM25, Dense, rrf

data = pydocs()
part = data.split("dev")
# A slice of the corpus that holds every judged document, so that this takes a minute.
judged = {document for found in part.qrels.values() for document in found}
corpus = data.corpus.subset([*judged, *(i for i in data.corpus.ids[::40] if i not in judged)])

bm25, dense = BM25(corpus), Dense(corpus, max_tokens=64)
systems = [bm25, dense, rrf(bm25, dense).named("fused")]
runs = [system(part.queries).drop(part.exclude) for system in systems]
print(compare(runs, part.qrels, ["nDCG@10"], clusters=part.clusters).table("nDCG@10"))
