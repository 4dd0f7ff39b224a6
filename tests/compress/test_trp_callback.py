"""TRP in the Hugging Face `Trainer`: the plain loop's steps, accumulation, resume."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fullrank.compress.trp import TRP  # noqa: E402
from fullrank.compress.trp_callback import TRPCallback  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402


class Data(torch.utils.data.Dataset):
    def __init__(self, n=16):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(n, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 3, (n,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


class Net(torch.nn.Module):
    """What `Trainer` asks of a model: a loss, first."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, pixel_values, labels):
        x = self.conv2(torch.relu(self.conv1(pixel_values))).mean((2, 3))
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def made(**options):
    torch.manual_seed(0)
    model = Net()
    settings = {"energy": 0.6, "period": 3, "nuclear_weight": 0.1, **options}
    return model, TRP(model, **settings)


def trainer(folder, model, callback, **changes):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings | changes)
    return transformers.Trainer(model, arguments, train_dataset=Data(), callbacks=[callback])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_the_plain_loop(tmp_path, accumulate):
    model, trp = made()
    batches = []
    run = trainer(
        tmp_path,
        model,
        TRPCallback(trp),
        gradient_accumulation_steps=accumulate,
        save_strategy="no",
    )
    inner = run.training_step

    def seen(model, inputs, *rest):
        batches.append({k: v.clone() for k, v in inputs.items()})
        return inner(model, inputs, *rest)

    run.training_step = seen
    run.train()
    other, plain = made()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        with plain.step():
            optimizer.zero_grad()
            for batch in group:
                (other(**batch)["loss"] / len(group)).backward()
        optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("checkpoint", [1, 4])
def test_resume_is_bit_equal(tmp_path, checkpoint):
    model, trp = made()
    trainer(tmp_path / "whole", model, TRPCallback(trp)).train()
    again, trp = made()
    run = trainer(tmp_path / "resumed", again, TRPCallback(trp))
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_it_refuses(tmp_path):
    with pytest.raises(InputError, match="takes a TRP, not a Net"):
        TRPCallback(Net())
    _, trp = made()
    arguments = transformers.TrainingArguments(str(tmp_path), max_grad_norm=0.0, use_cpu=True)
    arguments.fp16 = True
    with pytest.raises(InputError, match="set max_grad_norm"):
        TRPCallback(trp).on_train_begin(arguments, None, None)
