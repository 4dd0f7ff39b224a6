"""Training language models: it learns, it goes on where it stopped, it says what is wrong."""

import json
import math

import numpy as np
import pytest
import torch

from fullrank.core.errors import InputError, StoreError
from fullrank.datasets.texts import Texts
from fullrank.optim import MKOR, MKORH
from fullrank.training import LMTraining, optimizer_names, train_lm
from fullrank.training.interrupt import Interrupt
from fullrank.training.lm_data import Blocks, LMData, bits_per_byte, byte_tokenizer, encode

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
RANKED = {
    "galore_adamw",
    "galore_adafactor",
    "fira_adamw",
    "fira_rmsprop",
    "gradnormlorp_adamw",
    "lift",
}


@pytest.fixture(scope="module")
def texts():
    return Texts.divided("song", ["the cat sat on the mat and the dog sat on the log. " * 40])


def run_of(name="adamw", *changes, **sections):
    values = {
        "model": {"config": MODEL},
        "data": {"context": 16},
        "optimizer": {"name": name, "lr": 3e-3},
        "loop": {"steps": 12, "batch_size": 4, "evaluations": 3},
    }
    for section, keys in sections.items():
        values[section] = {**values[section], **keys}
    if name in RANKED:
        values["optimizer"]["rank"] = 4
    return LMTraining.of(values, changes)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def stop_after_five_steps(monkeypatch):
    """Ctrl-C, as far as the loop can tell."""
    asked = iter([False] * 4 + [True] * 100)
    monkeypatch.setattr(
        Interrupt,
        "wanted",
        property(lambda self: next(asked), lambda self, value: None),
        raising=False,
    )


def watched(method, look):
    """A method that something looks at first."""

    def wrapped(self, *args, **options):
        look(self)
        return method(self, *args, **options)

    return wrapped


def test_it_learns(texts):
    run = run_of("adamw", loop={"steps": 60, "evaluations": 4})
    trained = train_lm(run, texts=texts, progress=False)
    first, *_, last = [e.metric for e in trained.history.evaluations]
    assert first == pytest.approx(8, abs=0.3)
    assert last < 0.7 * first
    assert trained.history.gain == pytest.approx(first - trained.history.best.metric)
    assert trained.history.steps[-1].tokens == 60 * 4 * 15


@pytest.mark.parametrize("name", sorted(set(optimizer_names()) - {"lora_pro"}))
def test_every_optimizer_goes_on_bit_for_bit(name, texts, tmp_path, monkeypatch):
    run = run_of(name, optimizer={"options": {"inv_freq": 2}} if "mkor" in name else {})
    whole = train_lm(run, texts=texts, progress=False)
    stop_after_five_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_lm(run, texts=texts, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    parts = train_lm(run, texts=texts, out=tmp_path / "run", progress=False)
    assert [s.loss for s in parts.history.steps] == [s.loss for s in whole.history.steps]
    assert same(state(parts.model), state(whole.model))
    assert whole.history.evaluations[-1].metric < whole.history.evaluations[0].metric


def test_a_run_can_be_watched(texts, tmp_path, monkeypatch):
    from fullrank.spectra import read_run

    whole = train_lm(run_of(), texts=texts, progress=False)
    stop_after_five_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False, ranks_every=4)
    monkeypatch.undo()
    log = read_run(tmp_path / "run")
    assert log.stopped == "its trainer"
    assert 0 < log.last_step < 12
    assert list(log.measures["loss"]) == list(range(1, log.last_step + 1))
    parts = train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False, ranks_every=4)
    log = read_run(tmp_path / "run")
    assert log.stopped == "steps"
    assert list(log.measures["loss"].values()) == [s.loss for s in whole.history.steps]
    ranks = log.ranks["model.layers.0.mlp.up_proj"]
    assert {0, 4, 8, 12} <= set(ranks)
    assert all(1 <= rank <= 16 for rank in ranks.values())
    # Watching changes nothing.
    assert same(state(parts.model), state(whole.model))


def test_the_folder_loads_with_transformers(texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert same(state(trained.model), state(model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer("Aé")["input_ids"] == [65, 195, 169]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [line["kind"] for line in lines].count("step") == 12
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 13
    assert not (tmp_path / "run" / "checkpoints").exists()
    again = train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False)
    assert same(state(again.model), state(model))
    assert again.history == trained.history
    with pytest.raises(InputError, match="run with another optimizer"):
        train_lm(run_of(optimizer={"lr": 1e-4}), texts=texts, out=tmp_path / "run", progress=False)
    assert same(state(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), state(model))


def test_a_tokenizer_may_come_without_a_model(texts, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    run = run_of(data={"tokenizer": str(tmp_path)})
    trained = train_lm(run, texts=texts, progress=False)
    assert same(state(trained.model), state(train_lm(run_of(), texts=texts, progress=False).model))


def test_a_model_is_gone_on_from(texts, tmp_path):
    train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False)
    onward = run_of(model={"config": None, "name": str(tmp_path / "run")})
    trained = train_lm(onward, texts=texts, progress=False)
    before = json.loads((tmp_path / "run" / "training.json").read_text())["best"]
    assert trained.history.evaluations[0].metric == pytest.approx(before["bits per byte"])


def test_seeds_and_the_callers_randomness(texts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_lm(run_of(), texts=texts, progress=False)
    assert torch.equal(torch.rand(3), expected)
    other = train_lm(run_of(loop={"seed": 1}), texts=texts, progress=False)
    assert not same(state(first.model), state(other.model))


@pytest.mark.parametrize("name", ["adamw", "mkor"])
def test_accumulation_is_the_same_step(name, texts):
    loop = {"precision": "float32", "steps": 3}
    own = {"lr": 0.1, "options": {"inv_freq": 1}} if name == "mkor" else {}
    plain = run_of(name, optimizer=own, loop={**loop, "batch_size": 8})
    parts = run_of(name, optimizer=own, loop={**loop, "batch_size": 4, "accumulation": 2})
    one, two = (train_lm(run, texts=texts, progress=False) for run in (plain, parts))
    for name, tensor in state(one.model).items():
        torch.testing.assert_close(two.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_window_that_an_epoch_cuts_short_has_its_own_scale(texts, monkeypatch):
    scales = []
    monkeypatch.setattr(MKOR, "step", watched(MKOR.step, lambda o: scales.append(o.grad_scale)))
    # An epoch has 13 passes of 9.
    loop = {"batch_size": 9, "accumulation": 2, "steps": 8}
    train_lm(run_of("mkor", loop=loop), texts=texts, progress=False)
    assert scales == [0.5] * 6 + [1.0, 0.5]


def test_the_loss_of_a_step_is_shown_once(texts, monkeypatch):
    seen = []
    monkeypatch.setattr(MKORH, "observe", lambda self, loss: seen.append(float(loss)))
    run = run_of("mkorh", loop={"batch_size": 4, "accumulation": 3, "steps": 5})
    trained = train_lm(run, texts=texts, progress=False)
    assert seen == pytest.approx([step.loss for step in trained.history.steps], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stepping_in_the_backward_pass_is_the_same(accumulation, texts):
    # Epochs have an odd number of passes, and end with half a window.
    size = 9
    assert len(LMData.of(texts, byte_tokenizer(), 16, 100_000).train) // size % 2
    loop = {"clip": None, "precision": "float32", "steps": 12, "batch_size": size}
    loop["accumulation"] = accumulation
    plain = train_lm(run_of("galore_adamw", loop=loop), texts=texts, progress=False)
    layers = run_of("galore_adamw", optimizer={"per_layer": True}, loop=loop)
    per_layer = train_lm(layers, texts=texts, progress=False)
    assert same(state(plain.model), state(per_layer.model))


def test_early_stop_keeps_the_best_weights(texts):
    run = run_of(
        "sgd", optimizer={"lr": 30.0}, loop={"patience": 1, "evaluations": 20, "steps": 40}
    )
    trained = train_lm(run, texts=texts, progress=False)
    assert trained.history.stopped == "patience"
    assert trained.history.best.metric == min(e.metric for e in trained.history.evaluations)


def test_divergence_is_told(texts):
    run = run_of("sgd", optimizer={"lr": 1e6}, loop={"clip": None, "steps": 40})
    with pytest.raises(InputError, match="diverged"):
        train_lm(run, texts=texts, progress=False)


def test_bits_per_byte_is_that_of_the_model(texts):
    tokenizer = byte_tokenizer()
    data = LMData.of(texts, tokenizer, 16, 10_000)
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODEL, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model = AutoModelForCausalLM.from_config(config)
    found = bits_per_byte(model, data, 4, None)
    total = count = 0.0
    with torch.no_grad():
        for block in data.dev:
            ids = block["input_ids"]
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            total -= logs[torch.arange(len(ids) - 1), ids[1:]].sum().item()
            count += len(ids) - 1
    assert found == pytest.approx(total / count / math.log(2) / data.bytes_per_token, rel=1e-5)
    assert model.training


def test_every_token_but_the_first_is_predicted_once():
    ids = np.arange(23, dtype=np.int32)
    blocks = Blocks(ids, 5, rest=True)
    predicted = [t for block in blocks for t in block["labels"][1:].tolist()]
    assert predicted == list(range(1, 23))


def test_documents_are_separated():
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, ["ab", "c"]).tolist() == [97, 98, 256, 99]


def test_a_damaged_checkpoint_is_told(texts, tmp_path, monkeypatch):
    stop_after_five_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "optimizer.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(StoreError, match="damaged"):
        train_lm(run_of(), texts=texts, out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loop.steps=0"], "loop.steps"),
        (["loop.typo=1"], "loop.typo"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["model.name=x"], "either name"),
        (["optimizer.per_layer=true"], "loop.clip=null"),
        (["nonsense"], "section.key=value"),
        (["data.context.x=1"], "not a section"),
        (["loop.steps=[1"], r"loop.steps=\[1' cannot be read"),
        (["data.source=2024-13-45"], "cannot be read"),
        (["optimizer.lr=.inf"], "optimizer.lr"),
        (["loop.seed=4294967296"], "loop.seed"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        run_of("adamw", *changes)


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("adam", {}, "no optimizer 'adam'"),
        ("adamw", {"optimizer": {"rank": 4}}, "has no rank"),
        ("galore_adamw", {"optimizer": {"options": {"typo": 1}}}, "typo"),
        ("adamw", {"optimizer": {"options": {"typo": 1}}}, "typo"),
        ("lora_pro", {}, "LoRA"),
        ("mkor", {"optimizer": {"options": {"grad_scale": 0.5}}}, "grad_scale"),
        ("adamw", {"optimizer": {"options": {"betas": [0.9, 2]}}}, "beta parameter"),
        ("adamw", {"model": {"config": {**MODEL, "vocab_size": 100}}}, "the model knows 100"),
        ("adamw", {"data": {"context": 64}}, "takes 32 tokens"),
        ("adamw", {"data": {"source": "nowhere"}}, "no texts at"),
        ("adamw", {"loop": {"device": "gpu"}}, "no device 'gpu'"),
        ("adamw", {"loop": {"device": "cuda:99"}}, "no device 'cuda:99'"),
        ("adamw", {"model": {"config": {"model_type": "nothing"}}}, "no causal language model"),
        ("adamw", {"model": {"config": None, "name": "nowhere"}}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_named(name, sections, message, texts):
    run = run_of(name, **sections)
    given = None if run.data.source == "nowhere" else texts
    with pytest.raises(InputError, match=message) as told:
        train_lm(run, texts=given, progress=False)
    assert "minilm" not in str(told.value)  # an encoder does not take a language model's place


def test_too_little_text():
    with pytest.raises(InputError, match="less than one sequence"):
        train_lm(run_of(), texts=Texts("x", {"train": ("ab",), "dev": ("cd",)}), progress=False)
    for rest in (False, True):
        assert len(Blocks(np.empty(0, np.int32), 8, rest)) == 0


def test_files_of_settings(tmp_path):
    yaml, toml = tmp_path / "run.yaml", tmp_path / "run.toml"
    yaml.write_text("model: {config: {model_type: llama}}\noptimizer: {lr: 1.0e-2}\n")
    toml.write_text('[model.config]\nmodel_type = "llama"\n[optimizer]\nlr = 1e-2\n')
    assert LMTraining.read(yaml) == LMTraining.read(toml)
    assert LMTraining.read(yaml, ["optimizer.lr=1e-3", "loop.clip=null"]).optimizer.lr == 1e-3
    with pytest.raises(InputError, match="no file"):
        LMTraining.read(tmp_path / "absent.yaml")
    dated = LMTraining.read(yaml, ["data.source=2024-01-02", "data.tokenizer=nan"]).data
    assert (dated.source, dated.tokenizer) == ("2024-01-02", "nan")
    yaml.write_text("model:\n  config: {model_type: llama}\nloop:\noptimizer:\n  options:\n")
    assert LMTraining.read(yaml).loop == LMTraining.read(toml).loop
    assert LMTraining.read(yaml, ["loop.steps=3", "optimizer.options.eps=1.0"]).loop.steps == 3
    capitals = toml.rename(tmp_path / "RUN.TOML")
    assert LMTraining.read(capitals).optimizer.lr == 1e-2
    yaml.write_text("model:\n")
    with pytest.raises(InputError, match="model"):
        LMTraining.read(yaml)
    yaml.write_bytes(b"model: {name: \xff}")
    with pytest.raises(InputError, match="cannot be read"):
        LMTraining.read(yaml)
    yaml.write_text("model: [")
    with pytest.raises(InputError, match="cannot be read"):
        LMTraining.read(yaml)
