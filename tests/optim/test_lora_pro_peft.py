"""LoRAPro on PEFT's models, and in the Hugging Face Trainer."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft

from fullrank.core.errors import InputError
from fullrank.optim.lora_pro import LoRAPro, create_lorapro_optimizer


def llama(**lora):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **lora}
    return peft.get_peft_model(base, peft.LoraConfig(**options))


@pytest.fixture(scope="module")
def data():
    start = torch.randint(0, 64, (24, 1), generator=torch.Generator().manual_seed(0))
    rows = (start + torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, data, model, lr, **options):
    from transformers import Trainer, TrainingArguments

    # What a user writes: the one place where the Trainer asks for an optimizer of its model.
    class LoRAProTrainer(Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                rate = self.args.learning_rate
                self.optimizer = create_lorapro_optimizer(self.model, lr=rate, **options)
            return self.optimizer

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return LoRAProTrainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.parametrize(("options", "lr"), [({}, 0.02), ({"optimizer": "sgd"}, 2.0)])
def test_in_the_trainer_with_resume(tmp_path, data, options, lr):
    lora = {"use_rslora": True, "rank_pattern": {"down_proj": 6}, "lora_dropout": 0.1}
    model = llama(**lora)
    whole = trainer(tmp_path / "whole", data, model, lr, **options)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    pairs = whole.optimizer.optimizer.pairs
    assert {p.scaling for p in pairs} == {8 / 4**0.5, 8 / 6**0.5}
    assert {p.shape for p in pairs} == {(32, 32, 4), (32, 48, 6)}
    again = llama(**lora)
    resumed = trainer(tmp_path / "again", data, again, lr, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def step(model, optimizer, seed=0):
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss


def test_the_gradients_are_those_the_adjustment_is_for():
    model = llama()
    model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight.requires_grad_()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    G, s = layer.get_base_layer().weight.grad, layer.scaling["default"]
    torch.testing.assert_close(A.grad, s * B.T @ G, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(B.grad, s * G @ A.T, rtol=1e-4, atol=1e-7)


def test_each_adapter_has_its_own_pairs():
    model = llama()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapro_optimizer(model)
    assert sorted({(p.shape[2], p.scaling) for p in optimizer.pairs}) == [(2, 4.0), (4, 2.0)]
    step(model, optimizer)
    model.set_adapter("second")
    assert len(create_lorapro_optimizer(model).pairs) == 2


def test_dora_and_saved_modules_are_trained_too():
    model = llama(use_dora=True, modules_to_save=["lm_head"])
    optimizer = create_lorapro_optimizer(model, lr=0.05)
    others = optimizer.param_groups[1]["param_names"]
    assert any("lora_magnitude_vector" in name for name in others)
    assert any("lm_head" in name for name in others)
    first = step(model, optimizer)
    for _ in range(4):
        last = step(model, optimizer)
    assert last < first


def test_embeddings_are_announced():
    model = llama(target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UserWarning, match="embed_tokens"):
        optimizer = create_lorapro_optimizer(model)
    names = optimizer.param_groups[1]["param_names"]
    assert any("lora_embedding_A" in name for name in names)
    # PEFT starts this pair with A at zero.
    factor = model.base_model.model.model.embed_tokens.lora_embedding_A["default"]
    assert not factor.any()
    step(model, optimizer)
    assert factor.any()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.grouped(self.plain(x).relu()).mean((2, 3)))


def test_convolutions_are_pairs_but_grouped_ones_are_not():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["plain", "grouped", "head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Convolutions(), config)
    with pytest.warns(UserWarning, match="grouped"):
        optimizer = create_lorapro_optimizer(model, lr=0.02)
    assert [p.shape for p in optimizer.pairs] == [(8, 27, 4), (5, 8, 4)]
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_bf16_base_with_float32_factors_and_a_decaying_base():
    model = llama()
    for name, param in model.named_parameters():
        if "lora_" not in name:
            param.data = param.data.bfloat16()
    base = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    before = base.detach().clone()
    optimizer = LoRAPro(model, lr=0.1, weight_decay=0.5, decay_base=True)
    for pair in optimizer.pairs:
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    optimizer.step()
    torch.testing.assert_close(base.float(), 0.95 * before.float(), rtol=1e-2, atol=1e-6)


def test_models_without_lora_are_refused():
    model = llama().unload()
    with pytest.raises(InputError, match="no trainable LoRA pair"):
        create_lorapro_optimizer(model)


def test_resume_of_the_adapter_saved_by_peft(tmp_path):
    model = llama()
    optimizer = create_lorapro_optimizer(model, lr=0.02)
    for seed in range(3):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    base = llama().unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    other = create_lorapro_optimizer(loaded)
    other.load_state_dict(state)
    for seed in range(3, 5):
        step(model, optimizer, seed)
        step(loaded, other, seed)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
