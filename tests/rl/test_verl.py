"""VERL's trainer on a tiny model: it trains, resumes, and is GRPO where it is turned off."""

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from fullrank.core.errors import InputError, StoreError
from fullrank.rl import (
    VERLConfig,
    VERLRLOOConfig,
    VERLRLOOTrainer,
    VERLTrainer,
    arithmetic_reward,
)
from fullrank.training.lm_data import byte_tokenizer


def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def prompts():
    return Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    )


def digits(completions, **_):
    """A reward that a random model gets now and then."""
    return [sum(c.isdigit() for c in text) / 4 + len(text.strip()) / 40 for text in completions]


def settings(folder, kind=VERLConfig, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "disable_tqdm": True,
        "rank_stride": 3,
    }
    if kind is VERLRLOOConfig:
        # A reference model would be looked for by name.
        values["beta"] = 0.0
    return kind(**{**values, **changes})


def run(folder, prompts, trainer=VERLTrainer, resume=None, peft_config=None, **changes):
    kind = VERLRLOOConfig if trainer is VERLRLOOTrainer else VERLConfig
    made = trainer(
        model(),
        digits,
        args=settings(folder, kind, **changes),
        train_dataset=prompts,
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )
    made.train(resume_from_checkpoint=resume)
    return made


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [VERLTrainer, VERLRLOOTrainer])
def test_it_trains_and_logs_the_ranks(kind, prompts, tmp_path):
    trainer = run(tmp_path, prompts, kind)
    logged = [entry for entry in trainer.state.log_history if "rank/er" in entry]
    assert len(logged) == 2
    assert logged[0]["rank/er"] > 1
    # There is nothing to compare with in the first step.
    assert "rank/beta" not in logged[0] or logged[0].get("rank/rewarded", 0) == 0
    assert 0 <= logged[1]["rank/beta"] <= 1
    assert trainer.shaper.baselines is not None


def test_without_weight_it_is_grpo(prompts, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    off = run(tmp_path / "a", prompts, rank_aux_weight=0.0)
    values = settings(tmp_path / "b").to_dict()
    plain = GRPOConfig(
        **{
            name: values[name]
            for name in (
                "per_device_train_batch_size",
                "num_generations",
                "max_completion_length",
                "max_steps",
                "learning_rate",
                "logging_steps",
                "save_strategy",
                "use_cpu",
                "bf16",
                "seed",
                "disable_tqdm",
            )
        },
        output_dir=str(tmp_path / "b"),
        report_to="none",
    )
    trainer = GRPOTrainer(
        model(), digits, args=plain, train_dataset=prompts, processing_class=byte_tokenizer()
    )
    trainer.train()
    assert losses(off) == losses(trainer)
    for a, b in zip(off.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_bonus_changes_training_and_is_bounded(prompts, tmp_path):
    seen = []

    class Watched(VERLTrainer):
        def _generate_and_score_completions(self, inputs):
            shape = self.shaper.shape

            def watch(advantages, *measures, mask=None):
                shaped = shape(advantages, *measures, mask=mask)
                seen.append((advantages, shaped))
                return shaped

            self.shaper.shape = watch
            try:
                return super()._generate_and_score_completions(inputs)
            finally:
                self.shaper.shape = shape

    run(tmp_path, prompts, Watched, max_steps=4)
    assert torch.equal(*seen[0])
    assert any(not torch.equal(a, b) for a, b in seen[1:])
    for before, after in seen:
        assert (after >= before).all()
        assert ((after - before) <= before.abs() / 2 + 1e-6).all()


def test_hidden_states_are_those_behind_each_token(prompts, tmp_path):
    made = VERLTrainer(
        model(),
        digits,
        args=settings(tmp_path),
        train_dataset=prompts,
        processing_class=byte_tokenizer(),
    )
    ids = torch.tensor([[256, 49, 43, 50, 61, 51, 48], [49, 49, 43, 50, 61, 49, 51]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    out = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": mask[:, :4],
        "completion_ids": ids[:, 4:],
        "completion_mask": mask[:, 4:],
    }
    found = made._hidden_states(out)
    whole = made.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, whole[:, 3:-1], rtol=0, atol=1e-6)
    through = made._through_trainer(ids, mask, 3)
    torch.testing.assert_close(through, found, rtol=0, atol=1e-6)


def test_hidden_states_are_without_dropout(prompts, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False
    )
    made = VERLTrainer(
        model(),
        digits,
        args=settings(tmp_path),
        train_dataset=prompts,
        processing_class=byte_tokenizer(),
        peft_config=config,
    )
    made.model.train()
    ids = torch.arange(40, 56).reshape(2, 8)
    mask = torch.ones_like(ids)
    out = {"prompt_ids": ids[:, :3], "completion_ids": ids[:, 3:]}
    out |= {"prompt_mask": mask[:, :3], "completion_mask": mask[:, 3:]}
    assert torch.equal(made._hidden_states(out), made._hidden_states(out))
    assert made.model.training


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (VERLConfig, {"rank_stride": 0}, "rank_stride=0"),
        (VERLConfig, {"rank_max_tokens": 0}, "rank_max_tokens=0"),
        (VERLConfig, {"rank_kappa": 0.0}, "kappa=0"),
        (VERLRLOOConfig, {"rank_bonus_on": "last_token"}, "one advantage a response"),
    ],
)
def test_settings_are_refused_before_training(kind, values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        settings(tmp_path, kind, **values)
    official = settings(tmp_path, kind, rank_mode="PlanB", rank_ema="official").shaper()
    assert (official.mode, official.ema, official.start) == ("adaptive", 0.3, "official")


def test_last_token_bonus(prompts, tmp_path):
    trainer = run(tmp_path, prompts, rank_bonus_on="last_token", max_steps=3)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_with_an_adapter(prompts, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = run(tmp_path, prompts, peft_config=config)
    assert trainer.shaper.baselines is not None


def test_resume_goes_on_with_the_same_means(prompts, tmp_path):
    whole = run(tmp_path / "a", prompts, max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    again = run(tmp_path / "b", prompts, max_steps=4, resume=str(checkpoint))
    for a, b in zip(again.shaper.baselines, whole.shaper.baselines, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (checkpoint / "rank_shaper.json").write_text("{")
    with pytest.raises(StoreError, match="rank_shaper"):
        run(tmp_path / "c", prompts, max_steps=4, resume=str(checkpoint))


def test_rewards():
    conversation = [{"role": "assistant", "content": "so\n#### 1,200"}]
    assert arithmetic_reward([conversation, "none"], ["#### 1200", "3"]) == [1.0, 0.0]
    assert arithmetic_reward(["it is 0.50"], ["0.5"]) == [1.0]
    silent = [[], [{"role": "assistant", "content": None}]]
    assert arithmetic_reward(silent, ["1", "1"]) == [0.0, 0.0]
