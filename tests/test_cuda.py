"""What a GPU computes, against the CPU; a whole run on it. Skipped where there is none.

    pytest tests/test_cuda.py
"""

import math
import shutil

import pytest
import torch
from conftest import (
    Killed, players_on, randomise, read_log, run_script, scaled, subprocess_of, table_of, taxi_states, tiny_options,
    tiny_rl_options,
)

import envs
import eval as evaluation
import negatives
import plumbing.runs
import reflect_rl
import rl
import sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
checks = envs.beside("../models/checks.py")
MENU = ("go left", "go right", "wait")


def both(folder, **options):
    """The same players on the CPU and on the GPU, with one random state of their adapters."""
    found = [players_on(*reflect_rl.load_base(folder, device), **options) for device in ("cpu", "cuda")]
    cpu, gpu = (dict(players.model.named_parameters()) for players in found)
    with torch.no_grad():
        for name, weight in cpu.items():
            gpu[name].copy_(weight)  # `randomise` draws B on each device
    return found


def test_a_seed_gives_both_devices_the_same_adapter(base):
    """An adapter that is drawn by the GPU's generator is another one."""
    drawn = []
    for device in ("cpu", "cuda"):
        model, _ = reflect_rl.load_base(base, device)
        torch.manual_seed(3)
        reflect_rl.add_adapter(model, "policy", 4, 8)
        drawn.append([weight.detach().cpu() for weight in reflect_rl.adapter_parameters(model, "policy")])
    assert all(map(torch.equal, *drawn))


def test_scores_and_reflections(base):
    """Padding, caches or positions that are made on the wrong device or with other masks."""
    states, found = taxi_states(), []
    for players in both(base):
        steps = players.steps(states, [MENU] * len(states))
        players.score(steps)
        found.append(([step.reflection for step in steps], torch.tensor([step.log_probs for step in steps])))
    (cpu, gpu) = found
    assert cpu[0] == gpu[0]
    assert torch.allclose(cpu[1], gpu[1], atol=1e-4)


@pytest.mark.parametrize("stage", ["reflect", "policy"])
def test_losses_and_gradients(base, stage):
    records, found = negatives.make_records(envs.DangerousTaxi, 3, 0.5, seed=0)[0][:6], []
    for players in both(base, micro_batch=4):
        reflect_rl.use_adapter(players.model, stage)
        parameters = reflect_rl.adapter_parameters(players.model, stage)
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss = sft.loss_of(sft.examples_of(records, stage, players), players, backward=True)
        found.append((loss, torch.cat([parameter.grad.cpu().flatten() for parameter in parameters])))
    (cpu, gpu) = found
    assert math.isclose(cpu[0], gpu[0], rel_tol=1e-4)
    assert (cpu[1] - gpu[1]).norm() < 1e-3 * cpu[1].norm()


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_models_that_cap_or_scale_their_logits(kind, tokenizers):
    tokenizer, states, found = tokenizers["digit-splitting"], taxi_states(), []
    for device in ("cpu", "cuda"):
        players = players_on(scaled(kind, len(tokenizer)).to(device), tokenizer)
        torch.manual_seed(2)
        for layer in reflect_rl.lora_layers(players.model).values():
            for name in ("reflect", "policy"):
                drawn = torch.randn(layer.lora_B[name].shape) * 0.3
                layer.lora_B[name].data.copy_(drawn)
        steps = players.steps(states, [MENU] * len(states), [None] * len(states))
        players.score(steps)
        found.append(torch.tensor([step.log_probs for step in steps]))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "autocast"])
def test_low_precision_is_near(base, dtype):
    """bf16 has 8 bits: a score may move by some hundredths, not to another distribution."""
    states, found = taxi_states(), []
    for each in ("fp32", dtype):
        model, tokenizer = reflect_rl.load_base(base, "cuda", each)
        torch.manual_seed(0)
        for name in ("reflect", "policy"):
            reflect_rl.add_adapter(model, name, 4, 8)
        randomise(model, "policy", scale=0.02)
        players = reflect_rl.Players(model, tokenizer, dtype=each, max_reflection=8)
        steps = players.steps(states, [MENU] * len(states), [None] * len(states))
        players.score(steps)
        found.append(torch.tensor([step.log_probs for step in steps]).exp())
    assert (found[0] - found[1]).abs().max() < 0.1


def on_gpu(bases, runs, *more):
    return [*tiny_rl_options(bases["llama"], runs), "--device", "cuda", *more]


@pytest.mark.parametrize("more", [
    ("--algo", "reinforce", "--kl", "0.1"), ("--algo", "rloo"), ("--algo", "grpo", "--dtype", "bf16"),
    ("--algo", "ppo", "--replay", "2"), ("--algo", "paper", "--dtype", "autocast"),
    ("--gradient-checkpointing", "--micro-batch", "3"),
])
def test_the_whole_pipeline(more, bases, tmp_path, capsys, monkeypatch):
    """Every algorithm and precision; then the players are read on the CPU and play there."""
    run_script(rl, *on_gpu(bases, tmp_path / "runs", *more), monkeypatch=monkeypatch)
    assert table_of(capsys.readouterr().out)
    [folder] = (tmp_path / "runs").glob("corridor-rl*")
    assert len(read_log(folder)) == 4
    run_script(evaluation, "--env", "corridor:Corridor", "--run", folder, "--device", "cpu", "--repeats", 1,
               monkeypatch=monkeypatch)
    assert table_of(capsys.readouterr().out)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
@pytest.mark.parametrize("goes_on", ["cuda", "cpu"])
def test_a_run_goes_on_from_its_checkpoint(algo, goes_on, bases, tmp_path, monkeypatch):
    """Also on another device than it was begun on: an optimizer's state that stays on the old one fails or is lost."""
    options = on_gpu(bases, tmp_path / "whole", "--algo", algo)
    run_script(rl, *options, monkeypatch=monkeypatch)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    [whole] = (tmp_path / "whole").glob("corridor-rl*")
    cut = tmp_path / "cut" / whole.name
    shutil.rmtree(cut)
    options = on_gpu(bases, tmp_path / "cut", "--algo", algo)
    save_whole = plumbing.runs.Run.save

    def save(run, step, *rest, **more):
        save_whole(run, step, *rest, **more)
        if run.folder == cut and step == 2:
            raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(plumbing.runs.Run, "save", save)
        run_script(rl, *options, monkeypatch=context)
    run_script(rl, *options, "--resume", "--device", goes_on, monkeypatch=monkeypatch)
    for one, other in zip(read_log(whole), read_log(cut), strict=True):
        assert one["success"] == other["success"] and one["length"] == other["length"]
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-2, abs_tol=1e-5)


def test_torchrun_with_nccl(bases, tmp_path):
    """One process a GPU; tensors that must be on the GPU to be summed."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", torch.cuda.device_count(), "rl.py"]
    subprocess_of(*run, *on_gpu(bases, tmp_path / "runs"))
    subprocess_of("rl.py", *on_gpu(bases, tmp_path / "alone"))
    logs = [read_log(*(tmp_path / name).glob("corridor-rl*")) for name in ("runs", "alone")]
    for one, other in zip(*logs, strict=True):
        assert one["success"] == other["success"]
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-2, abs_tol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_forecast_of_memory(dtype, tmp_path, capsys, monkeypatch):
    """What a run says that it needs against what the GPU's allocator then gave, at its peak."""
    torch.cuda.reset_peak_memory_stats()
    size = ["--device", "cuda", "--dtype", dtype, "--batch", 32]
    run_script(sft, *tiny_options("nano", tmp_path), *size, monkeypatch=monkeypatch)
    [line, *_] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reflect: needs")]
    said = float(line.split()[2]) * 1e9
    assert 0.5 < torch.cuda.max_memory_allocated() / said < 1.5
