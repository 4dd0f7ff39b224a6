"""`fullrank train lm` as a user runs it."""

import pytest

RUN = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2}
data: {source: SOURCE, context: 16}
optimizer: {name: galore_adamw, rank: 4}
loop: {steps: 4, batch_size: 2, evaluations: 2}
"""


@pytest.fixture
def run_file(tmp_path):
    text = tmp_path / "song.txt"
    text.write_text("the cat sat on the mat. " * 60)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("SOURCE", str(text)))
    return path


def test_it_trains_and_says_where_the_model_is(fullrank, run_file, tmp_path):
    out = tmp_path / "model"
    done = fullrank("train", "lm", run_file, "loop.steps=6", "--out", out)
    assert done.code == 0, done.err
    assert "bits per byte" in done.out
    assert "galore_adamw (measured)" in done.out
    for name in ("model.safetensors", "tokenizer.json", "training.json", "log.jsonl", "log.csv"):
        assert (out / name).is_file()
    again = fullrank("train", "lm", run_file, "loop.steps=6", "--out", out)
    assert again.code == 0
    other = fullrank("train", "lm", run_file, "loop.steps=7", "--out", out)
    assert other.code == 2
    assert "another loop" in other.err


def test_the_example_is_a_run(fullrank, tmp_path):
    from fullrank.training import LMTraining

    example = fullrank("train", "lm", "--example")
    path = tmp_path / "run.yaml"
    path.write_text(example.out)
    assert LMTraining.read(path).optimizer.name == "galore_adamw"
    assert "fira_adamw" in fullrank("train", "lm", "--optimizers").out.split()


def test_a_name_that_is_still_the_examples_is_told(fullrank, tmp_path):
    path = tmp_path / "tune.yaml"
    path.write_text(fullrank("train", "finetune", "--example").out)
    done = fullrank("train", "finetune", path, "--out", tmp_path / "x")
    assert done.code == 2
    assert "write the folder or the Hugging Face name of a model there" in done.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loop.stepz=3", "loop.stepz: there is no such key; there are steps, seconds, batch_size"),
        ("loops.steps=3", "loops: there is no such key; there are model, data, optimizer, loop"),
        ("optimizer.name=adam", "no optimizer 'adam'"),
        ("data.source=nowhere.txt", "no texts at 'nowhere.txt'"),
    ],
)
def test_errors_are_one_line(fullrank, run_file, tmp_path, change, message):
    done = fullrank("train", "lm", run_file, change, "--out", tmp_path / "x")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "x").exists()
