"""Fine-tuning: every kind of model, with adapters and without; it goes on where it stopped."""

import json

import pytest
import torch
from tiny_models import bert_config, save_tokenizer

from fullrank.core.errors import InputError, StoreError
from fullrank.training.finetune import finetune
from fullrank.training.finetune_config import FinetuneRun
from fullrank.training.finetune_data import Rows, read_rows
from fullrank.training.interrupt import Interrupt
from fullrank.training.lm_data import byte_tokenizer

peft = pytest.importorskip("peft")

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
COLOURS, ANIMALS = ("red", "green", "blue"), ("cat", "dog", "bird", "fish")


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    BertModel(bert_config(vocabulary, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "song.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 40)
    pairs = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    labelled = [
        {"text": f"the {word} is {'slow' if i % 2 else 'fast'}", "label": kind}
        for i in range(8)
        for kind, words in (("colour", COLOURS), ("animal", ANIMALS))
        for word in words
    ]
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def run_of(lm_folder, bert_folder, tiny_folder, sources):
    bases = {"lm": lm_folder, "pairs": lm_folder, "classifier": bert_folder, "encoder": tiny_folder}
    files = {"lm": "song.txt", "pairs": "pairs.jsonl", "classifier": "labelled.jsonl"}

    def made(kind, *changes):
        values = {
            "model": {"kind": "lm" if kind == "pairs" else kind, "name": str(bases[kind])},
            "data": {"source": str(sources / files.get(kind, "")), "max_tokens": 16},
            "adapter": {"rank": 2},
            "optimizer": {"lr": 1e-2},
            "loop": {"steps": 6, "batch_size": 4, "evaluations": 3},
        }
        if "adapter.method=full" in changes:
            del values["adapter"]
        return FinetuneRun.of(values, changes)

    return made


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after_three_steps(monkeypatch):
    """Ctrl-C, as far as the loop can tell."""
    asked = iter([False] * 4 + [True] * 100)
    monkeypatch.setattr(
        Interrupt,
        "wanted",
        property(lambda self: next(asked), lambda self, value: None),
        raising=False,
    )


@pytest.mark.parametrize(
    ("kind", "method", "optimizer"),
    [
        ("lm", "lora", "adamw"),
        ("lm", "full", "galore_adamw"),
        ("lm", "lora_ga", "lora_pro"),
        ("lm", "gradnormlorp", "gradnormlorp_adamw"),
        ("pairs", "eva", "adamw"),
        ("pairs", "lora_sb", "adamw"),
        ("pairs", "pissa", "sgd"),
        ("pairs", "flylora", "adamw"),
        ("classifier", "lora_ga", "adamw"),
        ("classifier", "dora", "muon"),
        ("classifier", "full", "adamp"),
        ("encoder", "eva", "fira_adamw"),
        ("encoder", "lora_ga", "adamw"),
        ("encoder", "full", "adamw"),
    ],
)
def test_it_goes_on_bit_for_bit_and_is_found_again(
    kind, method, optimizer, run_of, toy, tmp_path, monkeypatch
):
    changes = [f"adapter.method={method}", f"optimizer.name={optimizer}"]
    if optimizer in ("galore_adamw", "gradnormlorp_adamw", "fira_adamw"):
        changes.append("optimizer.rank=1")
    if kind == "classifier" and method == "lora_ga":
        changes.append("adapter.rank=1")
    if method == "lora_sb":
        changes.append("adapter.options={n_samples: 20}")
    run = run_of(kind, *changes)
    data = toy if kind == "encoder" else None
    whole = finetune(run, data=data, progress=False)
    assert whole.history.stopped == "steps"
    assert len(whole.history.steps) == 6
    stop_after_three_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(run, data=data, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    parts = finetune(run, data=data, out=tmp_path / "run", progress=False)
    assert [s.loss for s in parts.history.steps] == [s.loss for s in whole.history.steps]
    measured = [(e.step, e.metric) for e in whole.history.evaluations]
    assert [(e.step, e.metric) for e in parts.history.evaluations] == measured
    assert same(state(parts.model), state(whole.model))
    again = finetune(run, data=data, out=tmp_path / "run", progress=False)
    assert again.history == parts.history
    x = batch_of(kind, parts)
    torch.testing.assert_close(x(again.model), x(parts.model), rtol=1e-4, atol=1e-5)


def batch_of(kind, tuned):
    """What a model makes of a few inputs."""
    if kind == "encoder":
        return lambda model: torch.from_numpy(model.encode(["bab bel", "cab"]))
    ids = torch.arange(5, 13)[None]
    return lambda model: model(input_ids=ids).logits.detach()


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("lm", "adamw"), ("pairs", "adamw"), ("classifier", "adamw")]
)
def test_it_learns(kind, optimizer, run_of):
    rates = ["optimizer.lr=2e-2", "loop.steps=60", "loop.batch_size=8"]
    tuned = finetune(run_of(kind, *rates), progress=False)
    assert tuned.history.gain > 0
    if kind == "classifier":
        assert tuned.history.best.metric == 1.0
        assert tuned.model.config.id2label == {0: "animal", 1: "colour"}
    assert tuned.data["trained_parameters"] < 0.5 * tuned.data["parameters"]


def test_the_folder_is_an_adapter_with_its_log(run_of, lm_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_of("lm", "adapter.method=eva", "adapter.options.rho=1.0")
    tuned = finetune(run, out=tmp_path / "run", progress=False)
    base = AutoModelForCausalLM.from_pretrained(lm_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "run")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, tuned.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("A")["input_ids"] == [65]
    for name in ("log.jsonl", "log.csv", "training.json"):
        assert (tmp_path / "run" / name).is_file()
    values = json.loads((tmp_path / "run" / "training.json").read_text())
    assert {layer["rank"] for layer in values["adapter"]} == {2}
    assert all(0 < layer["explained"] <= 1 for layer in values["adapter"])
    with pytest.raises(InputError, match="run with another adapter"):
        finetune(run_of("lm", "adapter.rank=1"), out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(("method", "rank"), [("lora", 1), ("lora_ga", 1), ("hydra", 2)])
@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_as_lora_loads_with_peft_alone(kind, method, rank, run_of, tmp_path):
    from fullrank.training.finetune_tasks import make_task
    from fullrank.training.processes import Processes

    run = run_of(kind, f"adapter.method={method}", "adapter.as_lora=true", f"adapter.rank={rank}")
    tuned = finetune(run, out=tmp_path / "run", progress=False)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    torch.manual_seed(0)
    base = make_task(run, None, Processes()).base
    again = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    x = batch_of(kind, tuned)
    torch.testing.assert_close(x(again), x(tuned.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [("adapter.method=dora", "not of low rank"), ("adapter.options.bias=all", "trained biases")],
)
def test_what_is_no_lora_is_told_before_training(change, message, run_of, tmp_path):
    run = run_of("lm", change, "adapter.as_lora=true")
    with pytest.raises(InputError, match=message):
        finetune(run, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_early_stop_keeps_the_best_weights(run_of):
    changes = ["optimizer.name=sgd", "optimizer.lr=30", "loop.patience=1", "loop.steps=40"]
    tuned = finetune(run_of("lm", *changes, "loop.evaluations=20"), progress=False)
    assert tuned.history.stopped == "patience"
    assert tuned.history.best.metric == min(e.metric for e in tuned.history.evaluations)


def test_what_is_kept_is_what_was_measured(run_of, tmp_path):
    from fullrank.training.finetune_tasks import make_task
    from fullrank.training.processes import Processes

    changes = ["adapter.method=flylora", "adapter.rank=8", "adapter.options.bias_update_rate=0.1"]
    loop = ["optimizer.lr=1", "loop.steps=20", "loop.evaluations=10", "loop.precision=float32"]
    run = run_of("lm", *changes, *loop, "loop.decay=constant")
    tuned = finetune(run, out=tmp_path / "run", progress=False)
    best = tuned.history.best
    assert 0 < best.step < 20
    measure = make_task(run, None, Processes()).measure
    assert measure(tuned.model)[0] == best.metric
    assert measure(finetune(run, out=tmp_path / "run", progress=False).model)[0] == best.metric


def test_best_weights_that_lack_a_buffer_are_refused(run_of, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    run = run_of("lm", "adapter.method=flylora")
    stop_after_three_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(run, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    (best,) = (tmp_path / "run" / "checkpoints").glob("*/best.safetensors")
    save_file({n: t for n, t in load_file(best).items() if "flylora_d" not in n}, best)
    with pytest.raises(StoreError, match="another version of fullrank"):
        finetune(run, out=tmp_path / "run", progress=False)


def test_a_plan_gives_the_ranks(run_of, lm_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from fullrank.core.names import model_fingerprint
    from fullrank.core.plan import PlanEntry, RankPlan

    model = AutoModelForCausalLM.from_pretrained(lm_folder)
    name = "model.layers.0.self_attn.q_proj"
    shape = tuple(model.get_submodule(name).weight.shape)
    fingerprint = model_fingerprint(model)
    plan = RankPlan({name: PlanEntry(shape, 3)}, purpose="adapter", fingerprint=fingerprint)
    path = plan.save(tmp_path / "plan.json")
    run = run_of("lm", "adapter.rank=null", f"adapter.plan={path}", "loop.steps=1")
    tuned = finetune(run, out=tmp_path / "run", progress=False)
    assert [(layer.name, layer.rank) for layer in tuned.adapter] == [(name, 3)]
    again = finetune(run, out=tmp_path / "run", progress=False)
    assert again.data == tuned.data
    plan.scale(0.5).save(path)
    with pytest.raises(InputError, match="another plan"):
        finetune(run, out=tmp_path / "run", progress=False)


def test_a_run_does_not_go_on_from_another_start(run_of, tmp_path, monkeypatch):
    run = run_of("lm", "adapter.method=lora_ga")
    stop_after_three_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(run, out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    (progress,) = (tmp_path / "run" / "checkpoints").glob("*/progress.json")
    values = json.loads(progress.read_text())
    values["identity"]["start of the adapter"] = "0"
    progress.write_text(json.dumps(values))
    with pytest.raises(InputError, match="another start of the adapter"):
        finetune(run, out=tmp_path / "run", progress=False)


def test_a_damaged_checkpoint_is_told(run_of, tmp_path, monkeypatch):
    stop_after_three_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(run_of("lm"), out=tmp_path / "run", progress=False)
    monkeypatch.undo()
    (weights,) = (tmp_path / "run" / "checkpoints").glob("*/trained.safetensors")
    weights.write_bytes(b"not weights")
    with pytest.raises(StoreError, match="damaged"):
        finetune(run_of("lm"), out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("lm", ["adapter.method=lorax"], "it is full or one of lora"),
        ("lm", ["adapter.rank=17"], "rank 17 is not in"),
        ("lm", ["adapter.targets=nothing"], "no linear layer is named like 'nothing'"),
        ("lm", ["adapter.options.typo=1"], "typo"),
        ("lm", ["optimizer.name=adam"], "no optimizer 'adam'"),
        ("lm", ["data.max_tokens=128"], "takes 64 tokens"),
        ("lm", ["data.source=nowhere"], "no texts at"),
        ("lm", ["model.name=nowhere"], "nowhere"),
        ("classifier", ["data.source=nowhere"], "no rows at"),
        ("classifier", ["data.label=kind"], "no 'kind' among the keys"),
    ],
)
def test_what_does_not_fit_is_named(kind, changes, message, run_of):
    with pytest.raises(InputError, match=message):
        finetune(run_of(kind, *changes), progress=False)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lm", "adapter.plan=x", "rank or a plan"),
        ("lm", "model.kind=vision", "model.kind"),
        ("lm", "optimizer.per_layer=true", "train lm"),
        ("encoder", "loop.batch_size=1", "no negatives"),
    ],
)
def test_settings_that_make_no_sense(kind, change, message, run_of):
    with pytest.raises(InputError, match=message):
        run_of(kind, change)
    with pytest.raises(InputError, match="leave out rank"):
        run_of(kind, "adapter.method=full", "adapter.rank=2")


@pytest.mark.parametrize("kind", ["lm", "pairs", "classifier"])
def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_told(kind, run_of, sources, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**LLAMA, "vocab_size": 100, "eos_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model knows 100 tokens"):
        finetune(run_of(kind, f"model.name={tmp_path}"), progress=False)


def test_texts_without_a_token_are_classified(run_of, lm_folder):
    # This tokenizer adds none.
    texts = [("", "a"), ("", "b"), ("", "a"), ("", "b"), ("c", "b"), ("", "a")]
    run = run_of("classifier", f"model.name={lm_folder}", "loop.batch_size=2")
    tuned = finetune(run, data=Rows("x", tuple(texts), tuple(texts[:3])), progress=False)
    assert tuned.history.stopped == "steps"


def test_folders_of_parts(run_of, tmp_path):
    for name, count in (("train", 3), ("validation", 2)):
        lines = [json.dumps({"text": str(i), "label": name}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    rows = read_rows(tmp_path, ("text", "label"))
    with pytest.raises(InputError, match="one label only"):
        finetune(run_of("classifier"), data=rows, progress=False)
    rows = Rows("x", (*rows.train, ("a", "b")), rows.dev)
    with pytest.raises(InputError, match="a label 'validation' that no train row has"):
        finetune(run_of("classifier"), data=rows, progress=False)
    assert [row[0] for row in rows.train] == ["0", "1", "2", "a"]
    assert [row[1] for row in rows.dev] == ["validation"] * 2
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"no dev\.jsonl"):
        read_rows(tmp_path, ("text", "label"))
