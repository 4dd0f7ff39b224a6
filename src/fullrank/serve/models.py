"""What the JSON API takes and gives."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Model(BaseModel):
    # A misspelt field is an error, not a silent default.
    model_config = ConfigDict(extra="forbid")


class StageTime(_Model):
    """One stage of the search and how long it took."""

    stage: str = Field(description="Name of the stage.", examples=["bm25"])
    milliseconds: float = Field(description="Time spent in this stage alone.", examples=[1.8])


class Snippet(_Model):
    """The part of a document that answers the query best."""

    text: str = Field(examples=["Solve the linear sum assignment problem."])
    highlights: list[tuple[int, int]] = Field(
        description="Ranges `[start, end)` of words of the query in `text`, in Unicode code "
        "points, in order and disjoint.",
        examples=[[[10, 16], [17, 20], [21, 31]]],
    )


class Result(_Model):
    """One document found."""

    rank: int = Field(description="From 1, best first.", examples=[1])
    id: str = Field(examples=["scipy.optimize.linear_sum_assignment"])
    title: str = Field(
        description="May be empty.", examples=["scipy.optimize.linear_sum_assignment"]
    )
    snippet: Snippet
    score: float = Field(
        description="Score of the whole system; comparable within one answer only.",
        examples=[0.0323],
    )
    scores: dict[str, float | None] = Field(
        description="Score of each stage for this document; null where that stage did not "
        "return it.",
        examples=[{"bm25": 14.2, "dense": 0.71, "rrf": 0.0323}],
    )


class SearchResponse(_Model):
    """The answer to a query."""

    query: str = Field(description="The query as it was searched.", examples=["assignment"])
    system: str = Field(examples=["rrf"])
    k: int = Field(description="Results asked for; there may be fewer.", examples=[10])
    milliseconds: float = Field(
        description="Time of the whole search, without waiting for its turn.", examples=[9.7]
    )
    stages: list[StageTime] = Field(description="In the order they ran.")
    results: list[Result]


class SystemInfo(_Model):
    """One way to search."""

    name: str = Field(description="What `system` takes.", examples=["rrf:tuned"])
    kind: str = Field(description="How it ranks.", examples=["rrf"])
    encoder: str | None = Field(
        description="With whose vectors, where there are several encoders.", examples=["tuned"]
    )
    description: str = Field(examples=["words and meaning, fused by reciprocal rank"])


class Bounds(_Model):
    """What the server accepts."""

    max_query: int = Field(description="Characters of a query.", examples=[1000])
    max_k: int = Field(description="Results of one search.", examples=[100])


class SystemsResponse(_Model):
    """The systems that can be searched with."""

    default: str = Field(examples=["rrf"])
    systems: list[SystemInfo]
    documents: int = Field(description="Documents in the index.", examples=[3500])
    limits: Bounds
    pages: list[str] = Field(
        description="Reports that are served beside the search.", examples=[["/xray"]]
    )


class DocumentResponse(_Model):
    """One document, whole."""

    id: str = Field(examples=["scipy.optimize.linear_sum_assignment"])
    title: str
    text: str
    truncated: bool = Field(description="Whether the text was cut because it is very long.")


class Health(_Model):
    """The server answers."""

    status: str = Field(examples=["ok"])
    documents: int = Field(examples=[3500])
    version: str = Field(examples=["0.1.0"])


class Problem(_Model):
    """Why a request was refused."""

    error: str = Field(
        description="A word for programs: `invalid_request`, `unknown_system`, `not_found`, "
        "`too_busy`, ...",
        examples=["invalid_request"],
    )
    detail: str = Field(
        description="A sentence for people.",
        examples=["k: Input should be less than or equal to 100"],
    )
