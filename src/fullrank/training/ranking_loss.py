"""The multiple-negatives ranking loss, without the negatives that are none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError

Features = dict[str, Any]


class MaskedRankingLoss(nn.Module):
    r"""Contrastive loss over a batch, with false negatives left out of the softmax.

    For pair i of a batch of B, with query vector q and document vectors d (unit length),

    .. math:: -\log \frac{\exp(s\, q_i \cdot d_i)}{\sum_{j \notin F_i} \exp(s\, q_i \cdot d_j)}

    where j runs over the relevant documents and hard negatives of all pairs and :math:`F_i` are
    those that are known not to be negatives of query i (:attr:`TrainingPairs.forbidden`): its own
    document, everything judged relevant to it, reverse pairs, copies. With nothing forbidden this
    is sentence-transformers' ``MultipleNegativesRankingLoss``.

    Parameters
    ----------
    model
        A ``SentenceTransformer``.
    forbidden
        For each row of a query, the rows of documents that are not negatives.
    scale
        The factor s, 20 as in sentence-transformers.
    chunk
        Texts that go through the model at a time, sorted by length, so that little is spent on
        padding; None for all at once. Vectors do not depend on it.
    autocast
        What the model computes in; None for the dtype of its weights.

    Examples
    --------
    >>> loss = MaskedRankingLoss(nn.Identity(), [{0}, {1}], scale=1.0)
    >>> vectors, rows = torch.eye(2), torch.tensor([[0, 0], [1, 1]])
    >>> round(float(loss.from_vectors([vectors, vectors], rows)), 4)
    0.3133
    """

    def __init__(
        self,
        model: nn.Module,
        forbidden: Sequence[Iterable[int]],
        *,
        scale: float = 20.0,
        chunk: int | None = 16,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.forbidden = [frozenset(rows) for rows in forbidden]
        self.scale = scale
        self.chunk = chunk
        self.autocast = autocast
        self.tokens = 0

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        """Mean loss of a batch.

        Parameters
        ----------
        sentence_features
            One batch of B texts a column: queries, relevant documents, hard negatives.
        labels
            (B, columns) rows of query and documents: what ``forbidden`` counts in.
        """
        columns = [dict(features) for features in sentence_features]
        self.tokens += sum(int(c["attention_mask"].sum()) for c in columns if _is_padded(c))
        device = labels.device.type
        with (
            torch.autocast(device, self.autocast)
            if self.autocast is not None
            else contextlib.nullcontext()
        ):
            vectors = embed(self.model, columns, self.chunk)
        return self.from_vectors(vectors, labels)

    def from_vectors(self, vectors: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Mean loss of (B, d) vectors a column; they are normalised here, in float32."""
        if labels.shape != (len(vectors[0]), len(vectors)):
            raise InputError(
                f"labels of shape {tuple(labels.shape)} for {len(vectors)} columns of "
                f"{len(vectors[0])} texts; give a row of numbers for each"
            )
        queries, *documents = (nn.functional.normalize(v.float(), dim=-1) for v in vectors)
        scores = queries @ torch.cat(documents).T * self.scale
        scores = scores.masked_fill(self.mask(labels).to(scores.device), -torch.inf)
        return nn.functional.cross_entropy(scores, torch.arange(len(queries), device=scores.device))

    def mask(self, labels: Tensor) -> Tensor:
        """(B, B * documents) True where a document is no negative of a query."""
        rows = labels.T.tolist()
        documents = [row for column in rows[1:] for row in column]
        mask = torch.tensor(
            [[row in self.forbidden[query] for row in documents] for query in rows[0]]
        )
        # The pair itself stays, and a hard negative was chosen for its own query.
        return mask & ~torch.eye(len(labels), dtype=torch.bool).repeat(1, len(rows) - 1)


def embed(model: nn.Module, columns: Sequence[Features], chunk: int | None) -> list[Tensor]:
    """Vectors of several columns of texts: together and in the order of their length."""
    merged = _merged(columns)
    if merged is None:
        return [model(column)["sentence_embedding"] for column in columns]
    lengths = merged["attention_mask"].sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    parts = []
    for rows in torch.split(order, chunk or len(order)):
        width = int(lengths[rows[0]])
        part = {
            name: value[rows, :width] if isinstance(value, Tensor) else value
            for name, value in merged.items()
        }
        parts.append(model(part)["sentence_embedding"])
    vectors = torch.cat(parts)[torch.argsort(order)]
    return list(torch.split(vectors, [len(column["attention_mask"]) for column in columns]))


def _is_padded(column: Features) -> bool:
    return isinstance(column.get("attention_mask"), Tensor) and column["attention_mask"].ndim == 2


def _merged(columns: Sequence[Features]) -> Features | None:
    """All columns as one batch padded on the right, or None where that is not what they are."""
    first = columns[0]
    for column in columns:
        if column.keys() != first.keys() or not _is_padded(column):
            return None
        if not bool(column["attention_mask"][:, 0].all()):
            return None
    width = max(column["attention_mask"].shape[1] for column in columns)
    merged: Features = {}
    for name, value in first.items():
        values = [column[name] for column in columns]
        if isinstance(value, Tensor):
            if any(column[name].shape != column["attention_mask"].shape for column in columns):
                return None
            padded = [nn.functional.pad(v, (0, width - v.shape[1])) for v in values]
            merged[name] = torch.cat(padded)
        elif any(v != value for v in values):
            return None
        else:
            merged[name] = value
    return merged
