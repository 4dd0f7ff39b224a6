"""Find the smallest encoder that keeps 95 % of nDCG@10; the floor holds at an interval's end."""

import sys

from fullrank.compress import save, shrink
from fullrank.core import DEFAULT_ENCODER
from fullrank.core.models import load_sentence_transformer
from fullrank.datasets import pydocs
from fullrank.retrieval import RankingMetric

data = pydocs()
part = data.split("dev")
judged = {document for found in part.qrels.values() for document in found}
others = [i for i in data.corpus.ids if i not in judged]
metric = RankingMetric(
    "nDCG@10", data.corpus.subset([*judged, *others[::16]]), part.queries, part.qrels,
    exclude=part.exclude, max_tokens=48,
)  # fmt: skip
texts = list(data.split("train").queries.values())[:200]
texts += [data.corpus[i].contents for i in others[1:1000:5]]

encoder = load_sentence_transformer(DEFAULT_ENCODER, device="cpu")
clusters = [part.clusters[q] for q in metric.queries]
found = shrink(
    encoder, metric, 0.95, calibration=texts, recover=False, clusters=clusters, max_length=48,
    max_candidates=3,
)  # fmt: skip
print(found.table())
print(save(found.model, sys.argv[1] if len(sys.argv) > 1 else "smaller"))
