"""Every adapter through what users of PEFT do with one; the rows are in ``cases``."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cases import CASES, shaken, train, trained  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from small_net import TARGETS, net, samples  # noqa: E402

from fullrank.adapters.export import save_as_lora  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402
from fullrank.core.names import model_fingerprint  # noqa: E402

WORKER = Path(__file__).with_name("matrix_worker.py")
NEAR = {"rtol": 1e-4, "atol": 1e-5}
IDS = samples()["ids"]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
side_by_side = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.several],
    ids=[name for name, case in CASES.items() if case.several],
)
every_merging = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.merges],
    ids=[name for name, case in CASES.items() if case.merges],
)
every_layer = pytest.mark.parametrize("kind", ["linear", "conv1d"])


@pytest.fixture(autouse=True)
def _no_warnings_of_peft():
    """PEFT warns of Conv1D, of a deleted active adapter, and of a base without a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_state(model):
    """Weights of the base under an adapter, by their name in the base."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in ("lora_", "lorasb_", "hydra_", "ga_start"))
    }


@every_case
@every_layer
def test_forward_and_backward(case, kind):
    model = shaken(case.put(net(kind), 2))
    logits = model(IDS)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, net(kind)(IDS), atol=1e-3)
    model(**samples())["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            assert not name.startswith("base_model.model.embed")
        else:
            assert parameter.grad is None, name
    before = base_state(model)
    first = model(**samples())["loss"]
    train(model, 10)
    assert model(**samples())["loss"] < first
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(model).items())


@every_case
def test_the_base_is_recognised_under_it(case):
    assert model_fingerprint(case.put(net(), 2)) == model_fingerprint(net())


@every_merging
@every_layer
def test_merging_and_unmerging(case, kind):
    model = shaken(case.put(net(kind), 2))
    expected, before = model(IDS), base_state(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(IDS), expected, **NEAR)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS), expected, **NEAR)
    for name, tensor in base_state(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert merged.state_dict().keys() == net(kind).state_dict().keys()
    torch.testing.assert_close(merged(IDS), expected, **NEAR)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.merges])
def test_what_no_weight_can_do_is_not_merged(name):
    model = shaken(CASES[name].put(net(), 2))
    expected, before = model(IDS), base_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="depends on the token"):
            merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(model).items())
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)


@every_merging
def test_a_safe_merge_of_broken_numbers_changes_nothing(case):
    model = case.put(net(), 2)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if ".wide." in name:
                parameter.fill_(float("nan"))
    before = base_state(model)
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(safe_merge=True)
    found = base_state(model)["wide.weight"]
    assert torch.equal(found, before["wide.weight"])


@every_case
@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
def test_a_file_gives_the_same_model(case, lazy, tmp_path):
    model = shaken(case.put(net(), 2))
    expected = model(IDS)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=lazy)
    assert not trained(again)
    exact = {"rtol": 0, "atol": 0} if case.bitwise else NEAR
    torch.testing.assert_close(again(IDS), expected, **exact)
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")
    torch.testing.assert_close(again(IDS), expected, **exact)


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Every adapter, saved here and loaded in a process that has made none."""
    folder = tmp_path_factory.mktemp("files")
    expected = {}
    for number, (name, case) in enumerate(CASES.items()):
        model = shaken(case.put(net(), 2))
        expected[name] = model(IDS)
        model.save_pretrained(folder / str(number) / "adapter")
    run("load", folder)
    return {
        name: (expected[name], torch.load(folder / str(number) / "found.pt"))
        for number, name in enumerate(CASES)
    }


def run(job, folder, *options):
    done = start(job, folder, *options)
    errors = done.communicate(timeout=120)[1]
    assert done.returncode == 0, errors[-3000:]


def start(job, folder, *options):
    command = [sys.executable, str(WORKER), job, str(folder), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_file_in_another_process(name, loaded_elsewhere):
    expected, found = loaded_elsewhere[name]
    torch.testing.assert_close(found, expected, **NEAR)


@every_case
@every_layer
def test_it_is_an_ordinary_lora_or_says_why_not(case, kind, tmp_path):
    model = shaken(case.put(net(kind), 2))
    if not case.low_rank:
        why = r"not of low rank.*use merge_and_unload" if case.merges else "depends on the token"
        with pytest.raises(InputError, match=f"wide.*{why}"):
            save_as_lora(model, tmp_path / "plain")
        return
    save_as_lora(model, tmp_path / "plain")
    again = peft.PeftModel.from_pretrained(net(kind), tmp_path / "plain")
    assert again.peft_config["default"].peft_type == peft.PeftType.LORA
    torch.testing.assert_close(again(IDS), model(IDS), **NEAR)


@every_case
def test_off_means_the_base(case):
    model = shaken(case.put(net(), 2))
    expected, on = net()(IDS), model(IDS)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), expected, **NEAR)
        assert not trained(model)
    torch.testing.assert_close(model(IDS), on, **NEAR)
    if case.options.get("mode") or case.method != "lora_ga":  # it changes the base and says so
        torch.testing.assert_close(model.unload()(IDS), expected, **NEAR)


@side_by_side
def test_adapters_of_two_ranks_side_by_side(case, tmp_path):
    model = shaken(case.put(net(), 2))
    first = model(IDS)
    model.add_adapter("b", case.config(3))
    assert all(".default" in name for name in trained(model))
    torch.testing.assert_close(model(IDS), first, rtol=0, atol=0)
    model.set_adapter("b")
    shaken(model, seed=1)
    assert all(".b" in name for name in trained(model))
    second = model(IDS)
    layer = model.base_model.model.wide
    assert (layer.r["default"], layer.r["b"]) == (2, 3)
    plain, x = layer.base_layer, torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    outputs = []
    for names in ("default", "b", ["default", "b"]):
        model.base_model.set_adapter(names)
        outputs.append(layer(x) - plain(x))
    if case.additive:
        torch.testing.assert_close(outputs[0] + outputs[1], outputs[2], **NEAR)
        both = model(IDS)
    if case.additive and case.merges:
        model.merge_adapter(["default", "b"])
        torch.testing.assert_close(model(IDS), both, **NEAR)
        model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "b")
    torch.testing.assert_close(again(IDS), second, **NEAR)
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS), first, **NEAR)
    model.delete_adapter("b")
    assert not any(".b." in f"{name}." for name in model.state_dict())
    assert not any("b" in getattr(layer, name) for name in layer.other_param_names)
    torch.testing.assert_close(model(IDS), first, **NEAR)


@side_by_side
def test_further_targets_may_differ(case):
    model = shaken(case.put(net(), 2, ["wide"]))
    first = model(IDS)
    model.add_adapter("b", case.config(2, ["tall"]))
    torch.testing.assert_close(model(IDS), first, rtol=0, atol=0)
    model.set_adapter("b")
    model(**samples())["loss"].backward()
    assert all(".tall." in name and p.grad is not None for name, p in trained(model).items())


@every_case
def test_a_narrow_base_has_a_wide_adapter(case, tmp_path):
    model = shaken(case.put(net(dtype=torch.bfloat16), 2))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    logits = model(IDS)
    assert logits.dtype == torch.bfloat16
    # The very same adapter on the same base in float32.
    wide = copy.deepcopy(model).float()
    assert (logits - wide(IDS)).norm() < 0.03 * logits.float().norm()
    train(model)
    expected = model(IDS)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(dtype=torch.bfloat16), tmp_path)
    exact = {"rtol": 0, "atol": 0} if case.bitwise else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(again(IDS), expected, **exact)
    if not case.merges:
        return
    merged = model.merge_and_unload()(IDS)
    assert merged.dtype == torch.bfloat16
    assert (merged - expected).float().norm() < 0.05 * expected.float().norm()


@every_merging
def test_a_wide_base_has_a_wide_adapter(case):
    model = shaken(case.put(net(dtype=torch.float64), 2))
    assert model(IDS).dtype == torch.float64
    expected = model(IDS)
    torch.testing.assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-6, atol=1e-7)


@every_case
def test_gradient_checkpointing_changes_nothing(case):
    model = shaken(case.put(net(), 2)).train()
    parameters = list(trained(model).values())
    expected = torch.autograd.grad(model(IDS).square().sum(), parameters)
    logits = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
    found = torch.autograd.grad(logits.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_case
def test_compiling(case):
    torch._dynamo.reset()
    model = shaken(case.put(net(), 2))
    parameters = list(trained(model).values())
    expected = torch.autograd.grad(model(IDS).square().sum(), parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=case.one_graph)
    found = torch.autograd.grad(compiled(IDS).square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained_together(tmp_path_factory):
    """Every adapter, trained by two processes on halves of the rows."""
    folder = tmp_path_factory.mktemp("together")
    running = [start("train", folder, rank) for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert all(p.returncode == 0 for p in running), "".join(e[-3000:] for e in errors)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, wrapper, trained_together):
    alone = CASES[name].put(net(dtype=torch.float64), 2)
    train(alone)
    found = torch.load(trained_together / f"{list(CASES).index(name)}.{wrapper}.pt")
    expected = trained(alone)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Starts are in float32, and sums over processes round in another order.
        torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-5, atol=1e-6)


@every_case
def test_resuming_is_bit_for_bit(case, tmp_path):
    whole = case.put(net(), 2)
    train(whole, 6)
    parts = case.put(net(), 2)
    saved = train(parts, 3)
    parts.save_pretrained(tmp_path)
    again = case.resume(case, net(), tmp_path)
    optimizer = torch.optim.AdamW(trained(again).values(), lr=0.02)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert not all(
        torch.equal(p, q)
        for p, q in zip(trained(parts).values(), trained(whole).values(), strict=True)
    )
    train(again, 3, optimizer)
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Stop(transformers.TrainerCallback):
    """The machine goes off after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


def trainer(model, folder, *callbacks):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=3,
    )
    rows = [{name: tensor[i] for name, tensor in samples().items()} for i in range(len(IDS))]
    return transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=list(callbacks) or None
    )


@every_case
def test_the_trainer_goes_on_bit_for_bit(case, tmp_path):
    whole = case.put(net(), 2)
    trainer(whole, tmp_path / "whole").train()
    stopped = case.put(net(), 2)
    trainer(stopped, tmp_path / "parts", Stop()).train()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    again = case.put(net(), 2)
    trainer(again, tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = stopped.state_dict()
    assert not all(torch.equal(changed[name], tensor) for name, tensor in expected.items())
    # What the checkpoint holds is an adapter for a fresh base.
    loaded = peft.PeftModel.from_pretrained(net(), checkpoint)
    torch.testing.assert_close(loaded(IDS), stopped.eval()(IDS), **NEAR)


@every_case
def test_embeddings_where_they_are_supported(case, tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    if "embedding" not in case.layers:
        if case.config is not CASES["lora"].config:
            with pytest.raises(ValueError, match="embed is a Embedding"):
                peft.get_peft_model(model, case.config(2, ["embed"]))
            assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
            assert all(p.requires_grad for p in model.parameters())
        return
    tuned = shaken(peft.get_peft_model(model, case.config(2, ["embed"])))
    expected = tuned(IDS)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(IDS), expected, **NEAR)
    torch.testing.assert_close(tuned.merge_and_unload()(IDS), expected, **NEAR)


@every_case
def test_a_file_for_another_base_names_the_layer(case, tmp_path):
    case.put(net(), 2).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"wide|bases"):
        peft.PeftModel.from_pretrained(net(middle=21), tmp_path)


@every_case
def test_targets_that_match_nothing_are_refused(case):
    model = net()
    with pytest.raises(ValueError, match=r"no linear layer is named like 'nowhere'"):
        case.put(model, 2, ["nowhere"])
    with pytest.raises(ValueError, match=r"rank 13 is not in|9 x 20: .*13"):
        case.put(model, 13, TARGETS)
    assert model.state_dict().keys() == net().state_dict().keys()
