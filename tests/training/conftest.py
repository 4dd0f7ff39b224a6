"""A tiny encoder to train."""

import pytest
from toy_collection import WORDS, make_toy


@pytest.fixture(scope="session")
def tiny_folder(tiny_encoder):
    return tiny_encoder(*WORDS, layers=2, length=40)


@pytest.fixture
def tiny(tiny_folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def toy():
    return make_toy()
