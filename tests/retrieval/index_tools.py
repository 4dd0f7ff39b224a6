"""What the tests of `Index` share: documents and an interruption."""

import random
import sys

from fullrank.core import Corpus, Document

TEXT = """
alpha beta gamma delta epsilon zeta theta iota kappa lambda omicron sigma upsilon omega matrix
vector tensor scalar spectrum rank value norm trace basis kernel image
"""
WORDS = TEXT.split()


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
