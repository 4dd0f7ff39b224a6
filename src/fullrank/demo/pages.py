"""What the demo's report says, section by section."""

from __future__ import annotations

from pathlib import Path

from fullrank.core.corpus import Corpus
from fullrank.core.table import Table
from fullrank.datasets import Dataset
from fullrank.demo.charts import Series, line_chart
from fullrank.demo.outcome import Outcome, machine, sizes_table
from fullrank.demo.report import Example, Hit, Section, write_page
from fullrank.demo.steps import chosen_candidate

_SIDE_BY_SIDE = ("BM25", "dense (base)", "dense (tuned)", "dense (shrunk)", "weighted (tuned)")
_SHOWN = 5


def write_report(outcome: Outcome, path: Path) -> Path:
    """Write the report of a demo."""
    gain, chosen = outcome.gain(), chosen_candidate(outcome.shrinking.found)
    lead = (
        f"{len(outcome.data.corpus):,} documents from the docstrings of "
        f"{', '.join(outcome.data.manifest['packages'])}. Fine-tuning changed the dense encoder's "
        f"nDCG@10 on {outcome.comparison.queries} test queries by {gain}; the shrunk encoder has "
        f"{chosen.kept:.0%} of its linear parameters and {outcome.floor}."
    )
    sections = [
        _results(outcome),
        _training(outcome),
        _spectra(outcome),
        _shrinking(outcome),
        _examples(outcome),
        _about(outcome),
    ]
    return write_page(path, "A search engine over this machine's documentation", lead, sections)


def _results(outcome: Outcome) -> Section:
    gain = outcome.gain()
    return (
        Section("Order: every system on the test queries", "results")
        .table(outcome.comparison.means())
        .table(outcome.comparison.table("nDCG@10"))
        .text(
            f"The claim in question, tuned against untuned: {gain} nDCG@10, p "
            f"{gain.p:.4f}. Intervals draw whole modules, since queries of one module are not "
            "independent. A query is the first line of a docstring; that docstring is left out of "
            "its ranking, and the documents its See Also section names are what should be found."
        )
        .text(
            "feedback reranks the dense ranking's first 100 by a pseudo-query; rrf and weighted "
            "fuse it with BM25. Weights were chosen on the dev queries: "
            f"{outcome.settings.dense_weight:g} for the dense ranking in the weighted fusion, "
            f"{outcome.settings.feedback_weight:g} for the mean of the first "
            f"{outcome.settings.feedback_documents} documents in the feedback."
        )
        .table(sizes_table(outcome.sizes))
        .table(outcome.latency)
    )


def _training(outcome: Outcome) -> Section:
    history, memory = outcome.trained.history, outcome.trained.memory
    losses = [step.loss for step in history.steps]
    window = max(1, len(losses) // 20)
    smooth = [
        sum(part) / len(part)
        for i in range(len(losses))
        if (part := losses[max(0, i - window + 1) : i + 1])
    ]
    evaluations = history.evaluations
    at = [e.step for e in evaluations]
    section = Section("Train: fine-tuning in little memory", "train")
    if losses:
        steps = [step.step for step in history.steps]
        section.picture(
            line_chart(
                [Series("loss", steps, smooth)],
                x_label="optimizer step",
                y_label="loss",
                markers=False,
            ),
            f"Multiple-negatives ranking loss, running mean of {window} steps.",
        )
    section.picture(
        line_chart(
            [Series(f"dev {history.metric}", at, [e.metric for e in evaluations])],
            x_label="optimizer step",
            y_label=f"dev {history.metric}",
        ),
        f"Development metric; the weights of the best one are kept. Training ended by "
        f"{history.stopped}.",
    ).picture(
        line_chart(
            [Series("RankMe", at, [e.rankme or 0.0 for e in evaluations])],
            x_label="optimizer step",
            y_label="RankMe",
        ),
        "RankMe, the effective rank of the documents' embeddings, needs no judgements. A fall "
        "would warn of collapse; a rise alone proves nothing.",
    )
    return (
        section.table(outcome.trained.table())
        .table(memory.table())
        .text(
            f"{history.tokens_per_second:,.0f} tokens a second. The state of GaLore's optimizer "
            f"peaked at {memory.peak_bytes / 1e6:.1f} MB, that of AdamW over the same parameters "
            f"would take {memory.adamw_bytes / 1e6:.1f} MB."
        )
    )


def _spectra(outcome: Outcome) -> Section:
    return (
        Section("See: what is inside", "see")
        .picture(
            outcome.after.heatmap_svg(),
            "Effective rank of each weight matrix of the tuned encoder, as a share of its "
            "narrower side.",
        )
        .raw('<p><a href="xray.html">The whole X-ray: spectra, energy, every matrix</a></p>')
        .raw("<details><summary>What fine-tuning changed, matrix by matrix</summary>")
        .table(outcome.before.compare(outcome.after))
        .raw("</details>")
    )


def _shrinking(outcome: Outcome) -> Section:
    found, uniform = outcome.shrinking.found, outcome.shrinking.uniform
    chosen = chosen_candidate(found)
    ours = Series(
        "by sensitivity, recovered",
        [c.kept for c in found.curve],
        [c.ratio for c in found.curve],
        [c.lower for c in found.curve],
        [c.ratio for c in found.curve],
    )
    usual = Series(
        "uniform, one shot",
        [p.kept for p in uniform],
        [p.ratio for p in uniform],
        [p.lower for p in uniform],
        [p.ratio for p in uniform],
        dashed=True,
    )
    chart = line_chart(
        [ours, usual],
        x_label="share of linear parameters kept",
        y_label="nDCG@10 against the tuned encoder",
        level=(outcome.config.floor, f"floor {outcome.config.floor:.0%}"),
        percent_x=True,
    )
    layers = Table(
        ["layer", "out", "in", "rank"],
        [
            [name, entry.shape[0], entry.shape[1], "dense" if entry.rank is None else entry.rank]
            for name, entry in found.plan.items()
        ],
        title="The chosen plan",
    )
    return (
        Section("Shrink: quality against size", "shrink")
        .picture(
            chart,
            "Every point as measured on the dev queries; bars reach down to the lower end of the "
            "one-sided 99 % interval, which has to stay at or above the floor.",
        )
        .table(found.table())
        .text(
            f"{_verdict(outcome)} {chosen.kept:.1%} of the linear parameters "
            f"({chosen.linear_parameters:,}; {chosen.parameters:,} with the token embeddings). "
            f"Tested once on test: it {outcome.floor}. The strictest floor that an equally good "
            f"model would pass is {outcome.shrinking.decidable:.1%} with the dev queries and "
            f"{outcome.decidable:.1%} with the test queries."
        )
        .raw("<details><summary>The rank of every layer</summary>")
        .table(layers)
        .raw("</details>")
    )


def _verdict(outcome: Outcome) -> str:
    if outcome.shrinking.found.floor_test.holds:
        return "Chosen on dev:"
    return "No plan that was measured holds the floor on dev; the one that came closest:"


def _examples(outcome: Outcome) -> Section:
    test = outcome.data.split("test")
    contrast = outcome.comparison.contrast("dense (tuned)", "dense (base)", top=3)
    picked = [d.query for d in (*contrast.gains[:3], *contrast.drops[:2])]
    others = [q for q in test.queries if q not in picked]
    picked += others[:: max(1, len(others) // 3)][:3]
    return (
        Section("Queries side by side", "queries")
        .text(
            "Three that fine-tuning helped most, two that it hurt most, three others. Documents "
            "that the See Also section names are set in colour."
        )
        .examples([_example(outcome, test, query) for query in picked])
    )


def _example(outcome: Outcome, test: Dataset, query: str) -> Example:
    corpus, wanted = outcome.data.corpus, test.qrels[query]
    return Example(
        test.queries[query],
        [_title(corpus, i) for i in wanted],
        {
            system: [
                Hit(_title(corpus, i), i in wanted)
                for i in outcome.runs[system][query].ids[:_SHOWN].tolist()
            ]
            for system in _SIDE_BY_SIDE
            if system in outcome.runs
        },
    )


def _title(corpus: Corpus, identifier: str) -> str:
    return corpus[identifier].title or identifier


def _about(outcome: Outcome) -> Section:
    manifest = outcome.data.manifest
    facts = [
        *((f"package {name}", str(version)) for name, version in manifest["packages"].items()),
        ("documents", f"{len(outcome.data.corpus):,}"),
        *((f"queries, {part}", f"{len(qs):,}") for part, qs in outcome.data.parts.items()),
        ("SHA-256 of the corpus", str(manifest["sha256"])),
        *((name, str(value)) for name, value in machine().items()),
        ("peak resident memory", f"{outcome.peak_bytes / 2**30:.2f} GiB"),
        ("entries taken from the cache", str(outcome.from_cache)),
    ]
    seconds = Table(
        ["step", "seconds"],
        [[title, taken] for title, taken in outcome.seconds.items()],
        title="Time",
        formats={"seconds": ".1f"},
    )
    return (
        Section("What it was measured on", "about")
        .table(Table(["", " "], [[name, value] for name, value in facts]))
        .table(seconds)
        .text("Made by: fullrank demo. The folder can be searched with: fullrank serve FOLDER")
    )
