"""`fullrank adapters` and `fullrank train finetune` as a user runs them."""

import json
import subprocess
import sys

import pytest
import torch

from fullrank.adapters import inspect as look

peft = pytest.importorskip("peft")

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    from fullrank.training.lm_data import byte_tokenizer

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **CONFIG)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Two adapters of different ranks and scalings, and one with DoRA."""
    made = {}
    for seed, (name, options) in enumerate(
        {
            "one": {"r": 2, "lora_alpha": 3, "rank_pattern": {"v_proj": 1}},
            "two": {"r": 3, "use_rslora": True},
            "dora": {"r": 2, "use_dora": True},
        }.items()
    ):
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
        )
        model = peft.get_peft_model(load(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def logits(base, folder):
    model = peft.PeftModel.from_pretrained(load(base), folder).eval()
    return model(input_ids=torch.arange(9)[None]).logits.detach()


def deltas(base, folder):
    model = peft.PeftModel.from_pretrained(load(base), folder)
    layers = model.base_model.model.model.layers[0].self_attn
    return {n: getattr(layers, n).get_delta_weight("default") for n in ("q_proj", "v_proj")}


def test_inspect_shows_the_layers(fullrank, folders):
    done = fullrank("adapters", "inspect", folders["one"], folders["dora"])
    assert done.code == 0, done.err
    assert "q_proj" in done.out
    assert "16 x 16" in done.out
    rows = look(folders["dora"]).rows
    assert [row[2] for row in rows] == [2, 2, None, None]
    assert str(rows[-1][0]).endswith("v_proj.lora_magnitude_vector")


@pytest.mark.parametrize("name", ["one", "two"])
def test_convert_is_the_same_adapter_with_scaling_one(fullrank, base, folders, name, tmp_path):
    done = fullrank("adapters", "convert", folders[name], "--out", tmp_path / "lora")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    torch.testing.assert_close(logits(base, tmp_path / "lora"), logits(base, folders[name]))
    again = fullrank("adapters", "convert", folders[name], "--out", tmp_path / "lora")
    assert again.code == 2
    assert "is there already" in again.err


def test_merge_is_the_weighted_sum(fullrank, base, folders, tmp_path):
    pair = (folders["one"], folders["two"])
    done = fullrank("adapters", "merge", *pair, "--weights", "0.5,-1", "--out", tmp_path / "both")
    assert done.code == 0, done.err
    first, second = (deltas(base, folder) for folder in pair)
    for name, found in deltas(base, tmp_path / "both").items():
        expected = 0.5 * first[name] - second[name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cut = fullrank("adapters", "merge", *pair, "--rank", 2, "--out", tmp_path / "cut")
    assert "lost" in cut.out
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "holds no adapter"),
        (["convert", "DORA", "--out", "OUT"], "no update of low rank"),
        (["merge", "ONE", "--out", "OUT"], "at least two folders"),
        (["merge", "ONE", "DORA", "--out", "OUT"], "no update of low rank"),
        (["merge", "ONE", "ONE", "--weights", "a,b", "--out", "OUT"], "numbers with commas"),
        (["merge", "ONE", "ONE", "--weights", "1", "--out", "OUT"], "2 finite numbers"),
    ],
)
def test_errors_are_one_line_and_write_nothing(fullrank, folders, tmp_path, arguments, message):
    named = {"DORA": folders["dora"], "ONE": folders["one"], "OUT": tmp_path / "out"}
    done = fullrank("adapters", *(named.get(a, a) for a in arguments))
    assert done.code == 2
    assert message in done.err.replace("\n", " ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_loads_on_its_base_and_on_no_other(base, folders, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from fullrank.adapters.loading import load_adapter
    from fullrank.core.errors import InputError

    model = load_adapter(folders["one"])
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, logits(base, folders["one"]))
    other = AutoConfig.for_model("llama", **{**CONFIG, "hidden_size": 24})
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="for another base model"):
        load_adapter(folders["one"], tmp_path / "other")


def test_finetune_trains_and_says_how_to_load_it(fullrank, base, tmp_path):
    text = tmp_path / "song.txt"
    text.write_text("the cat sat on the mat. " * 60)
    run = tmp_path / "run.toml"
    run.write_text(
        f'[model]\nname = "{base}"\n[data]\nsource = "{text}"\nmax_tokens = 16\n'
        '[adapter]\nmethod = "eva"\nrank = 2\n[loop]\nsteps = 4\nbatch_size = 2\nevaluations = 2\n'
    )
    out = tmp_path / "tuned"
    done = fullrank("train", "finetune", run, "loop.steps=5", "--out", out)
    assert done.code == 0, done.err
    assert "bits per byte" in done.out
    assert "PeftModel.from_pretrained" in done.out.replace("\n", "")
    assert (out / "adapter_model.safetensors").is_file()
    assert fullrank("adapters", "inspect", out).code == 0
    other = fullrank("train", "finetune", run, "--out", out)
    assert other.code == 2
    assert "another loop" in other.err


@pytest.mark.slow
def test_an_adapter_of_our_own_type_is_trained_loaded_and_converted(fullrank, base, tmp_path):
    text = tmp_path / "song.txt"
    text.write_text("the cat sat on the mat. " * 60)
    run = tmp_path / "run.toml"
    run.write_text(
        f'[model]\nname = "{base}"\n[data]\nsource = "{text}"\nmax_tokens = 16\n'
        '[adapter]\nmethod = "lora_sb"\nrank = 4\noptions = {lr = 1e-3, n_samples = 4}\n'
        "[loop]\nsteps = 2\nbatch_size = 2\nevaluations = 1\n"
    )
    out, plain = tmp_path / "tuned", tmp_path / "plain"
    done = fullrank("train", "finetune", run, "--out", out)
    assert done.code == 0, done.err
    assert "import fullrank.adapters.lora_sb; peft." in " ".join(done.out.split())
    assert fullrank("train", "finetune", run, "--out", out).code == 0
    # A process that knows the type from the file alone.
    command = [sys.executable, "-m", "fullrank", "adapters", "convert", out, "--out", plain]
    converted = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert converted.returncode == 0, converted.stderr[-2000:]
    torch.testing.assert_close(logits(base, plain), logits(base, out), rtol=1e-4, atol=1e-4)


def test_the_example_is_a_run_and_names_are_listed(fullrank, tmp_path):
    from fullrank.adapters.adapt_methods import METHODS
    from fullrank.training.finetune_config import FinetuneRun

    path = tmp_path / "run.yaml"
    path.write_text(fullrank("train", "finetune", "--example").out)
    assert FinetuneRun.read(path).adapter.method == "eva"
    listed = fullrank("train", "finetune", "--adapters").out
    assert {line.split()[0] for line in listed.splitlines()} == {*METHODS, "full"}
    assert "lora_pro" in fullrank("train", "finetune", "--optimizers").out


def test_flylora_tasks_are_merged_side_by_side(base, tmp_path, fullrank):
    from fullrank.adapters import FlyLoraConfig

    expected = []
    for seed in range(2):
        config = FlyLoraConfig(
            r=4, k=1, seed=seed, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(load(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(tmp_path / f"task{seed}")
        expected.append(model)
    found = fullrank(
        "adapters", "merge", str(tmp_path / "task0"), str(tmp_path / "task1"), "--out",
        str(tmp_path / "both"), "--base", str(base),
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "import fullrank.adapters.flylora" in " ".join(found.out.split())
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "both").eval()
    layer = merged.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(9))
    parts = []
    for model in expected:
        alone = model.base_model.model.model.layers[0].self_attn.q_proj.eval()
        parts.append(alone(x) - alone.base_layer(x))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), sum(parts) / 2, rtol=1e-4, atol=1e-5)
