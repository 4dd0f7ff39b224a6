"""Data quality by gradients: what the two measures say of good and bad data, and what they cost.

    FULLRANK_DATA=... python benchmarks/gradient_quality.py          # all of it
    FULLRANK_DATA=... python benchmarks/gradient_quality.py speed    # or: data

``data``: a Llama of 3 layers and width 96 over 1,000 byte pairs is trained for 650 steps on
WikiText-2 and GSM8K, then judges the data sets of the paper's authors (the 200 highest and lowest
of WizardLM by reward and by difficulty) and GSM8K problems that were tampered with. q, k, v and o
averaged, mean and standard error; at whole lengths (up to 512 tokens) and at 64 tokens of each
response. The gates: more than three standard errors in the direction that is claimed.
``speed``: spectra of every example's gradients, from inputs and output gradients, against forming
each gradient by backpropagation and taking its SVD, in turns, CPU time on one thread; and the
most bytes alive beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fullrank.bench.memory import Peak
from fullrank.core import Table
from fullrank.datasets.texts import Texts
from fullrank.spectra.gradient_comparison import MEASURES
from fullrank.spectra.gradient_examples import examples_of, read_examples
from fullrank.spectra.gradient_quality import GradientQuality
from fullrank.spectra.gradient_spectrum import example_gradients
from fullrank.training import LMTraining, train_lm

DATA = Path(os.environ.get("FULLRANK_DATA", "shared/data"))
STEPS = 650
LONGEST = 512


def problems(part: str) -> list[dict[str, str]]:
    path = next((DATA / "gsm8k").glob(f"*{part}*"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"instruction": row["question"], "output": row["answer"]} for row in rows]


def trained(folder: Path) -> tuple[torch.nn.Module, object]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    wiki = [p.read_text(encoding="utf-8") for p in sorted((DATA / "wikitext-2").glob("*.txt"))]
    maths = [f"{row['instruction']}\n{row['output']}\n" for row in problems("train")]
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator([*wiki, *maths], pairs)
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder / "tokenizer")
    run = LMTraining.of(
        {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 96,
                    "intermediate_size": 256,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "max_position_embeddings": LONGEST,
                }
            },
            "data": {"context": 128, "tokenizer": str(folder / "tokenizer")},
            "optimizer": {"name": "adamw", "lr": 3e-3},
            "loop": {"steps": STEPS, "batch_size": 16, "evaluations": 2},
        }
    )
    texts = Texts.divided("wikitext-2 and gsm8k", [*wiki, "".join(maths)])
    found = train_lm(run, texts=texts, out=folder / "model", progress=False)
    losses = [step.loss for step in found.history.steps[-50:]]
    print(f"trained for {STEPS} steps: loss {statistics.fmean(losses):.2f} nats a token\n")
    return (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )


def tampered() -> dict[str, list[dict[str, str]]]:
    rows = problems("test")[:200]
    chance = random.Random(0)

    def changed(change) -> list[dict[str, str]]:
        return [{**row, "output": change(row["output"])} for row in rows]

    def shuffled(text: str) -> str:
        words = text.split()
        chance.shuffle(words)
        return " ".join(words)

    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        "clean": rows,
        "words shuffled": changed(shuffled),
        "one word repeated": changed(lambda text: " ".join(["apples"] * len(text.split()))),
        "random letters": changed(
            lambda text: "".join(c if c == " " else chance.choice(letters) for c in text)
        ),
        "another's answer": [
            {**row, "output": other["output"]}
            for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        ],
    }


def by_the_authors(quality: GradientQuality) -> Table:
    rows = []
    for length in (None, 64):
        for score, name in (("reward", "reward"), ("diff", "difficulty")):
            files = [
                DATA / "gradient-quality" / f"{score}_wiz_{end}_200.json"
                for end in ("highest", "lowest")
            ]
            sets = [read_examples(path) for path in files]
            found = quality.compare(*sets, length, names=("high", "low"), progress=False)
            tokens = [statistics.fmean(r.tokens for r in s.rows) for s in found.scores]
            counts = " / ".join(str(len(s.rows)) for s in found.scores)
            row = [name, "all" if length is None else str(length), counts]
            row += [" / ".join(f"{t:.0f}" for t in tokens)]
            for what in MEASURES:
                gap = found.difference(what)
                row += [f"{gap.a:.2f} / {gap.b:.2f}", f"{gap.z:+.1f}"]
            rows.append(row)
    columns = ["WizardLM, highest / lowest by", "tokens scored", "examples", "mean tokens"]
    columns += ["nuclear norm", "z", "effective rank", "z of rank"]
    return Table(columns, rows)


def by_tampering(quality: GradientQuality, length: int = 48) -> Table:
    sets = tampered()
    rows = []
    for name in list(sets)[1:]:
        names = ("clean", name)
        found = quality.compare(sets["clean"], sets[name], length, names=names, progress=False)
        row = [name, " / ".join(str(len(s.rows)) for s in found.scores)]
        for what in MEASURES:
            gap = found.difference(what)
            row += [f"{gap.a:.2f} / {gap.b:.2f}", f"{gap.z:+.1f}"]
        rows.append(row)
    columns = [f"GSM8K clean against ({length} tokens)", "examples", "nuclear norm", "z"]
    return Table([*columns, "effective rank", "z of rank"], rows)


def by_length(quality: GradientQuality) -> Table:
    rows = []
    examples = examples_of(problems("test")[:200])
    for length in (8, 16, 32, 64):
        scores = GradientQuality(
            quality.model, quality.tokenizer, quality.max_length, length_match=length
        ).score(examples, progress=False)
        means = [statistics.fmean(r.mean(w) for r in scores.rows) for w in ("nuclear", "erank")]
        rows.append([length, len(scores.rows), *means])
    return Table(["GSM8K clean, tokens", "examples", "nuclear norm", "effective rank"], rows)


def speed(rounds: int = 3) -> Table:
    torch.set_num_threads(1)
    rows = []
    for width, tokens in ((384, 64), (896, 64), (896, 256), (896, 512)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=8,
        )
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 1000, (2, tokens))
        names = [n for n, _ in model.named_parameters() if "self_attn" in n]
        spent: dict[str, list[float]] = {"formed": [], "ours": []}

        def formed(model=model, ids=ids, names=names) -> None:
            for row in ids:
                model.zero_grad(set_to_none=True)
                model(input_ids=row[None], labels=row[None]).loss.backward()
                for name in names:
                    torch.linalg.svdvals(model.get_parameter(name).grad)

        def ours(model=model, ids=ids) -> None:
            example_gradients(model, ids, ids)

        for _ in range(rounds):
            for way, work in (("formed", formed), ("ours", ours)):
                began = time.process_time()
                work()
                spent[way].append(time.process_time() - began)
        other, own = (statistics.median(spent[way]) for way in ("formed", "ours"))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peaks = []
        for work in (formed, ours):
            model.zero_grad(set_to_none=True)
            # What was alive beyond the weights.
            peaks.append((Peak().of(work, model) - weights) / 2**20)
        rows.append([width, tokens, 1000 * other, 1000 * own, other / own, *peaks])
    columns = ["width", "tokens", "gradients and SVDs, ms", "ours, ms", "times faster"]
    formats = dict.fromkeys(columns[2:4], ".0f") | {columns[4]: ".1f"}
    memory = ["their peak, MiB", "ours, MiB"]
    columns, formats = columns + memory, formats | dict.fromkeys(memory, ".0f")
    return Table(columns, rows, "Two examples, two layers, q k v o", formats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["data", "speed"])
    wanted = parser.parse_args().what
    if "data" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            quality = GradientQuality(*trained(Path(folder)), LONGEST)
            for table in (by_the_authors, by_tampering, by_length):
                print(table(quality).markdown(), "\n")
    if "speed" in wanted:
        print(speed().markdown())


if __name__ == "__main__":
    main()
