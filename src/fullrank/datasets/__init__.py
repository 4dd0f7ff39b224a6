"""Readers of documents and test collections, and the built-in corpus."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.datasets.beir import beir as beir
    from fullrank.datasets.builtin import cranfield as cranfield
    from fullrank.datasets.builtin import vaswani as vaswani
    from fullrank.datasets.dataset import Dataset as Dataset
    from fullrank.datasets.docstrings.build import pydocs as pydocs
    from fullrank.datasets.huggingface import from_huggingface as from_huggingface
    from fullrank.datasets.ir_datasets_ids import from_ir_datasets as from_ir_datasets
    from fullrank.datasets.jsonl import jsonl as jsonl
    from fullrank.datasets.judgements import read_qrels as read_qrels
    from fullrank.datasets.python_source import python_source as python_source
    from fullrank.datasets.query_files import read_queries as read_queries
    from fullrank.datasets.sources import read_corpus as read_corpus
    from fullrank.datasets.sources import read_dataset as read_dataset
    from fullrank.datasets.text_folder import text_folder as text_folder
    from fullrank.datasets.texts import Texts as Texts
    from fullrank.datasets.texts import read_texts as read_texts
    from fullrank.datasets.topics import read_topics as read_topics
    from fullrank.datasets.trec import trec as trec
    from fullrank.datasets.trec import trec_documents as trec_documents
    from fullrank.datasets.tsv import tsv as tsv

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["cranfield", "vaswani"], "builtin"),
        **dict.fromkeys(["read_corpus", "read_dataset"], "sources"),
        **dict.fromkeys(["trec", "trec_documents"], "trec"),
        "Dataset": "dataset",
        "beir": "beir",
        "from_huggingface": "huggingface",
        "from_ir_datasets": "ir_datasets_ids",
        "jsonl": "jsonl",
        "pydocs": "docstrings.build",
        "python_source": "python_source",
        "read_qrels": "judgements",
        "read_queries": "query_files",
        "read_topics": "topics",
        "text_folder": "text_folder",
        **dict.fromkeys(["Texts", "read_texts"], "texts"),
        "tsv": "tsv",
    },
)
