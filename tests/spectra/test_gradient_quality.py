"""Data quality by gradients: which tokens count, files that go on, comparisons, the command."""

import numpy as np
import pytest
import torch
from tiny_models import byte_language_model

transformers = pytest.importorskip("transformers")

from fullrank.core.errors import InputError  # noqa: E402
from fullrank.spectra import GradientQuality  # noqa: E402
from fullrank.spectra import gradient_quality as module  # noqa: E402
from fullrank.spectra.gradient_comparison import Difference  # noqa: E402
from fullrank.spectra.gradient_examples import (  # noqa: E402
    examples_of,
    padded,
    read_examples,
    tokens_of,
)
from fullrank.spectra.gradient_scores import reference_scores, with_ifd  # noqa: E402
from fullrank.training.lm_data import byte_tokenizer  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "by", "the", "door"]


@pytest.fixture(scope="module")
def model():
    return byte_language_model()


def rows(count=9, seed=0, **more):
    generator = np.random.default_rng(seed)
    return [
        {
            "instruction": f"Say something about {WORDS[i % len(WORDS)]}.",
            "output": " ".join(generator.choice(WORDS, 4 + i)),
            "reward": str(i / 2),
            **more,
        }
        for i in range(count)
    ]


def quality(model, **options):
    return GradientQuality(model, byte_tokenizer(), **{"batch_tokens": 256, **options})


def test_prompt_and_response_are_tokenised_apart():
    (one,) = examples_of([{"instruction": "a", "input": "b", "response": "cd"}])
    found = tokens_of(byte_tokenizer(), one, max_length=100)
    assert bytes(found.ids) == b"a\nb\ncd"
    assert found.start == 4
    ids, labels, mask = padded([found, tokens_of(byte_tokenizer(), one, max_length=5)], 0)
    assert labels.tolist() == [[-100] * 4 + [99, 100], [-100] * 4 + [99, -100]]
    assert mask.sum(1).tolist() == [6, 5]
    assert ids.shape == (2, 6)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"instruction": "a", "output": " "}, {}, "empty"),
        ({"instruction": "a" * 50, "output": "b"}, {"max_length": 20}, "prompt alone"),
        ({"instruction": "a", "output": "bcd"}, {"length_match": 5}, "shorter than 5"),
        (
            {"instruction": "a" * 18, "output": "bcdef"},
            {"length_match": 5, "max_length": 20},
            "lon",
        ),
    ],
)
def test_what_cannot_be_scored_is_left_out_with_a_reason(model, row, options, reason):
    found = quality(model, **options).score([row, {"instruction": "x", "output": "y" * 9}])
    assert reason in found.skipped["0"]
    assert [r.id for r in found.rows] == ["1"]


def test_scores_do_not_depend_on_the_company(model):
    data = rows()
    together = quality(model).score(data, progress=False)
    assert [r.id for r in together.rows] == [str(i) for i in range(9)]
    for row, example in zip(together.rows, data, strict=True):
        (alone,) = quality(model).score([example], progress=False).rows
        assert row.loss == pytest.approx(alone.loss, rel=1e-5)
        assert row.tokens == alone.tokens == len(example["output"])
        assert row.mean("erank") == pytest.approx(alone.mean("erank"), rel=1e-3)
        assert row.given == {"reward": float(example["reward"])}
    assert all(1 <= rank <= 16 for row in together.rows for rank in row.erank.values())


def test_scores_are_columns(model):
    found = quality(model).score(rows(2), progress=False)
    assert found.columns == ["id", "loss", "n_tokens", "layer", "proj", "nuclear", "erank"]
    assert len(found) == len(found["id"]) == 2 * 8
    assert found["n_tokens"][0] == found.rows[0].n_tokens == found.rows[0].tokens
    assert found["proj"][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    frame = found.frame()
    assert list(frame.columns) == found.columns
    assert frame["erank"].tolist() == found["erank"]
    with pytest.raises(KeyError, match="no column 'rank'"):
        found["rank"]


def test_files_as_they_come(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "2+2", "answer": 4}\n')
    assert [(e.prompt, e.response) for e in read_examples(path)] == [("2+2", "4")]
    path.write_text('{"prompt": "a\u2028b", "output": "c"}\n', encoding="utf-8")
    assert [e.prompt for e in read_examples(path)] == ["a\u2028b"]


def test_an_interrupted_file_ends_the_same(model, tmp_path, monkeypatch):
    data = rows()
    whole = quality(model).score(data, out=tmp_path / "whole.jsonl", progress=False)
    real, calls = module.example_gradients, iter(range(100))

    def stopped(*args, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "example_gradients", stopped)
    with pytest.raises(KeyboardInterrupt):
        quality(model).score(data, out=tmp_path / "parts.jsonl", progress=False)
    monkeypatch.undo()
    # The machine went off in the middle of a batch, and of a line.
    lines = (tmp_path / "parts.jsonl").read_text().splitlines()
    assert 1 < len(lines) < 10
    (tmp_path / "parts.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    parts = quality(model).score(data, out=tmp_path / "parts.jsonl", progress=False)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert parts == whole
    monkeypatch.setattr(module, "example_gradients", None)  # nothing is computed again
    assert quality(model).score(data, out=tmp_path / "whole.jsonl", progress=False) == whole
    with pytest.raises(InputError, match="another model, data or settings"):
        quality(model).score(data[:3], out=tmp_path / "whole.jsonl", progress=False)
    of_mlps = quality(model, modules=lambda name, _: "mlp" in name)
    with pytest.raises(InputError, match="another model, data or settings"):
        of_mlps.score(data, out=tmp_path / "whole.jsonl", progress=False)


def test_a_gradient_that_is_not_finite_is_left_out_alone(model):
    broken = transformers.LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[ord("Z")] = float("nan")
    data = [*rows(3), {"instruction": "Z", "output": "the cat"}]
    found = quality(broken).score(data, progress=False)
    assert [r.id for r in found.rows] == ["0", "1", "2"]
    assert "not finite" in found.skipped["3"]


def test_a_gradient_that_is_not_finite_is_a_reason_though_the_loss_is(model):
    broken = transformers.LlamaForCausalLM(model.config)
    broken.model.layers[1].register_full_backward_hook(lambda _, to, __: (to[0] * torch.nan,))
    found = quality(broken).score(rows(3), progress=False)
    assert not found.rows
    name = "model.layers.0.self_attn.q_proj"
    assert set(found.skipped.values()) == {f"the gradient of {name} is not finite"}


def test_comparing_is_at_one_length_by_default(model, tmp_path):
    a, b = rows(9), rows(9, seed=1)
    found = quality(model).compare(a, b, 24, names=("one", "two"), progress=False)
    assert {row.tokens for scores in found.scores for row in scores.rows} == {24}
    assert all(scores.skipped for scores in found.scores)
    values = [[row.mean("erank") for row in scores.rows] for scores in found.scores]
    expected = Difference.of(*values)
    assert found.difference("erank").z == pytest.approx(expected.z)
    assert [row[0] for row in found.table().rows] == ["q_proj", "k_proj", "v_proj", "o_proj", "all"]
    assert "24 tokens" in found.table().title
    page = found.to_html(tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 2 * 8
    assert "shorter than 24" in page
    whole = quality(model).compare(a, b, None, progress=False)
    assert "lengths alone" in whole.table().title
    with pytest.raises(InputError, match="0 examples to compare"):
        quality(model).compare(a, b, 500, progress=False)


def test_sorting_by_each_measure(model):
    data = rows()
    scores = {r.id: r for r in quality(model).score(data, progress=False).rows}
    for by, best in (("erank", max), ("nuclear", min), ("loss", min)):
        order = quality(model).rank(data, by, progress=False)
        assert order[0] == best(scores, key=lambda i, by=by: scores[i].mean(by))
    with pytest.raises(InputError, match="by="):
        quality(model).rank(data, "size")


def test_ifd_is_the_ratio_of_two_perplexities(model):
    (score,) = reference_scores(model, byte_tokenizer(), rows(1), progress=False).values()
    (one,) = examples_of(rows(1))
    after = tokens_of(byte_tokenizer(), one, max_length=100)
    ids, labels, _ = padded([after], 0)
    with torch.no_grad():
        loss = float(model.eval()(input_ids=ids, labels=labels).loss)
        alone = torch.tensor([after.ids[after.start :]])
        before = float(model(input_ids=alone, labels=alone).loss)
    assert score.perplexity == pytest.approx(np.exp(loss), rel=1e-5)
    assert score.ifd == pytest.approx(np.exp(loss - before), rel=1e-5)
    found = quality(model).score(with_ifd(model, byte_tokenizer(), rows(4)), progress=False)
    table = found.correlations()
    assert [row[0] for row in table.rows] == ["tokens", "loss", "reward", "IFD"]
    assert all(-1 <= value <= 1 for row in table.rows for value in row[2:])


def test_bad_input(model, tmp_path):
    with pytest.raises(InputError, match="float16"):
        quality(transformers.LlamaForCausalLM(model.config).half())
    with pytest.raises(InputError, match="max_length"):
        quality(model, max_length=1)
    with pytest.raises(InputError, match="no linear layer matches"):
        quality(model, modules="nowhere").score(rows(2), progress=False)
    with pytest.raises(InputError, match="row 0: there is no instruction"):
        examples_of([{"text": "a"}])
    with pytest.raises(InputError, match="the id 'x'"):
        examples_of(rows(2, id="x"))
    assert [e.id for e in examples_of(rows(2, id=None))] == ["0", "1"]
    with pytest.raises(InputError, match="no example"):
        examples_of([])
    with pytest.raises(InputError, match=r"row 0: a text is expected for .*, not a list"):
        examples_of([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}])
    with pytest.raises(InputError, match="no chat template"):
        quality(model, template="chat").score(rows(1), progress=False)
    (tmp_path / "latin.json").write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(InputError, match="not in UTF-8"):
        read_examples(tmp_path / "latin.json")
    with pytest.raises(InputError, match="there is no file"):
        read_examples(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(InputError, match="neither a JSON list"):
        read_examples(tmp_path / "broken.json")
