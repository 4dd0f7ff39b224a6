"""Fine-tuning in two processes: what one does with batches twice as large."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import bert_config, save_tokenizer

from fullrank.training.lm_data import byte_tokenizer

pytest.importorskip("peft")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

WORKER = Path(__file__).with_name("finetune_worker.py")
STEPS, BATCH = 6, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Settings of a run on text, one on completions and one of a classifier."""
    from transformers import AutoConfig, AutoModelForCausalLM, BertModel

    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    ends = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    config = AutoConfig.for_model("llama", num_attention_heads=2, **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    byte_tokenizer().save_pretrained(folder / "lm")
    (folder / "bert").mkdir()
    vocabulary = save_tokenizer(folder / "bert")
    # Each process would drop others than the one does.
    sizes = {"num_hidden_layers": 1, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    BertModel(bert_config(vocabulary, **sizes)).save_pretrained(folder / "bert")
    (folder / "song.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 40)
    # Completions of different lengths: each process then has another number of tokens.
    pairs = [{"prompt": f"{i}+{i}=", "completion": str(2 * i) * (1 + i % 4)} for i in range(60)]
    labelled = [
        {"text": f"the {word} is {'slow' if i % 2 else 'fast'}", "label": kind}
        for i in range(8)
        for kind, words in (("colour", ("red", "blue")), ("animal", ("cat", "dog")))
        for word in words
    ]
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)

    def settings(kind, base, source, method, optimizer):
        return {
            "model": {"kind": kind, "name": str(folder / base)},
            "data": {"source": str(folder / source), "max_tokens": 16},
            "adapter": {"method": method, "rank": 2},
            "optimizer": {"name": optimizer, "lr": 1e-2},
            "loop": {"steps": STEPS, "batch_size": BATCH, "evaluations": 2, "device": "cpu"},
        }

    return {
        "text": settings("lm", "lm", "song.txt", "lora_ga", "lora_pro"),
        "pairs": settings("lm", "lm", "pairs.jsonl", "eva", "adamw"),
        "labels": settings("classifier", "bert", "labelled.jsonl", "lora", "adamw"),
    }


def launch(folder, runs, processes):
    folder.mkdir()
    path = folder / "runs.json"
    # The start of an adapter takes the same batches either way.
    path.write_text(
        json.dumps(
            {
                name: {**run, "loop": {**run["loop"], "batch_size": 2 * BATCH // processes}}
                for name, run in runs.items()
            }
        )
    )
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), str(path)], capture_output=True, timeout=580
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_tune_as_one_with_batches_twice_as_large(runs, tmp_path):
    one = launch(tmp_path / "one", runs, 1)
    two = launch(tmp_path / "two", runs, 2)
    for name in runs:
        first, second, other = (
            torch.load(path, weights_only=True)
            for path in (one / f"{name}-0.pt", two / f"{name}-0.pt", two / f"{name}-1.pt")
        )
        torch.testing.assert_close(second["losses"], first["losses"], rtol=3e-4, atol=1e-5)
        torch.testing.assert_close(second["metrics"], first["metrics"], rtol=3e-4, atol=1e-5)
        assert second["tokens"] == first["tokens"]
        assert second["metrics"] == other["metrics"]
        for key, weight in second["weights"].items():
            assert torch.equal(weight, other["weights"][key]), key
        assert (two / name / "adapter_config.json").is_file()
        assert not (two / name / "checkpoints").exists()
