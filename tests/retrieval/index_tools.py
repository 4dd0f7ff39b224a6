"""What the tests of `Index` share: a tiny encoder, documents, an interruption."""

import random
import sys
from pathlib import Path

from fullrank.core import Corpus, Document

TEXT = """
alpha beta gamma delta epsilon zeta theta iota kappa lambda omicron sigma upsilon omega matrix
vector tensor scalar spectrum rank value norm trace basis kernel image
"""
WORDS = TEXT.split()


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a random BERT of one layer, 32 numbers a vector, 32 tokens a text."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    inner = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[inner, Pooling(32)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def make_documents(count: int, start: int = 0, words: int = 8) -> list[Document]:
    """Return random documents with metadata."""
    out = []
    for row in range(start, start + count):
        draw = random.Random(row)
        out.append(
            Document(
                f"d{row}",
                " ".join(draw.choices(WORDS, k=words)),
                title=f"{draw.choice(WORDS)} {draw.choice(WORDS)}",
                metadata={
                    "year": 2000 + row % 5,
                    "lang": "en" if row % 3 else "de",
                    "tags": [draw.choice("xyz")],
                    "draft": row % 2 == 0,
                },
            )
        )
    return out


def make_corpus(count: int, start: int = 0, words: int = 8) -> Corpus:
    """Return random documents as a corpus."""
    return Corpus.from_documents(make_documents(count, start, words))


def counted(call, at: int = -1) -> int:
    """Run something; raise KeyboardInterrupt before the line number ``at`` of ours.

    Returns how many lines of the index's modules were run, when nothing was raised.
    """
    lines = 0

    def local(frame, event, argument):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return local

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        ours = "/fullrank/retrieval/index" in name or name.endswith("/core/files.py")
        return local if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
