"""Order: corpora, indexes, retrievers, rerankers and the operators that compose them."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.core.corpus import Corpus as Corpus
    from fullrank.core.run import Run as Run
    from fullrank.retrieval.bm25 import BM25 as BM25
    from fullrank.retrieval.cross_encoder import CrossEncoderReranker as CrossEncoderReranker
    from fullrank.retrieval.dense import Dense as Dense
    from fullrank.retrieval.encoder import Encoder as Encoder
    from fullrank.retrieval.exact import ExactSearch as ExactSearch
    from fullrank.retrieval.index import Index as Index
    from fullrank.retrieval.metric import RankingMetric as RankingMetric
    from fullrank.retrieval.passages import Passages as Passages
    from fullrank.retrieval.passages import split_passages as split_passages
    from fullrank.retrieval.protocols import Generator as Generator
    from fullrank.retrieval.protocols import Reranker as Reranker
    from fullrank.retrieval.protocols import Retriever as Retriever
    from fullrank.retrieval.pseudo_query import FeedbackChoice as FeedbackChoice
    from fullrank.retrieval.pseudo_query import PseudoQueryReranker as PseudoQueryReranker
    from fullrank.retrieval.pseudo_query import tune_feedback as tune_feedback
    from fullrank.retrieval.retriever import RetrieverStage as RetrieverStage
    from fullrank.retrieval.stages import Stage as Stage
    from fullrank.retrieval.stages import rrf as rrf
    from fullrank.retrieval.stages import weighted as weighted

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Corpus", "Run", "Stage", "rrf", "weighted"], "stages"),
        **dict.fromkeys(["Generator", "Reranker", "Retriever"], "protocols"),
        **dict.fromkeys(["FeedbackChoice", "PseudoQueryReranker", "tune_feedback"], "pseudo_query"),
        **dict.fromkeys(["Passages", "split_passages"], "passages"),
        "BM25": "bm25",
        "CrossEncoderReranker": "cross_encoder",
        "Dense": "dense",
        "Encoder": "encoder",
        "ExactSearch": "exact",
        "Index": "index",
        "RankingMetric": "metric",
        "RetrieverStage": "retriever",
    },
)
