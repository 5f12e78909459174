"""The online stage: formulas, losses and gradients against independent computations; whole runs that repeat, resume
and survive a kill. A test names the bug that it would catch.
"""

import copy
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT, Killed, make_players, read_log, resolved, run_script, subprocess_of, table_of, tiny_rl_options,
)
from safetensors.torch import load_file

import curriculum
import envs
import eval as evaluation
import plumbing.processes
import plumbing.runs
import reflect_rl
import rl
import sft
from envs import UserError
from reflect_rl import adapter_parameters, play

ALGORITHMS = tuple(rl.ALGORITHMS)


class Walk(envs.Env):
    """A corridor with the goal at its right end. At its left end "go left" is no valid action; a jump is fatal.

    Random play succeeds, dies and runs out of time often enough for every branch of the update.
    """

    curriculum = [("near", 0.5, {"near": 1}), ("far", 0.5, {})]
    horizon = 5

    def __init__(self, near=0):
        self.near = near

    def tasks(self, split):
        start = {"train": 0, "valid": 12, "test": 16}[split]
        return [{"goal": 2 + i % 3, "number": i} for i in range(start, start + (12 if split == "train" else 4))]

    def reset(self, *, seed=None, options=None):
        self.task, rng = options["task"], random.Random(seed)
        self.here = min(rng.randrange(2) + (2 if options.get("near", self.near) else 0), self.task["goal"] - 1)
        self.steps = 0
        return self.render(), {"actions": self.actions(), "success": False}

    def step(self, action):
        name = self.actions()[action]
        self.here += {"go left": -1, "go right": 1}.get(name, 0)
        self.steps, success = self.steps + 1, self.here == self.task["goal"]
        terminated = success or name == "jump"
        reward = 1.0 if success else -0.5 if terminated else -0.1
        info = {"actions": self.actions(), "success": success}
        return self.render(), reward, terminated, not terminated and self.steps >= self.horizon, info

    def actions(self):
        return ("go right", "wait", "jump") if self.here == 0 else ("go left", "go right", "wait", "jump")

    def render(self):
        return f"{'.' * self.here}W{'.' * (self.task['goal'] - self.here - 1)}G task {self.task['number']}"

    def expert_action(self):
        return self.actions().index("go right")


def rl_args(*options):
    """The resolved options of `python rl.py options`."""
    panel = {"repeats": evaluation.OPTIONS["repeats"]}
    tables = (sft.DATA_OPTIONS, sft.OPTIONS, rl.OPTIONS, panel)
    args = resolved("--device", "cpu", *options, tables=tables)
    rl.resolve(args)
    return args


@pytest.fixture(scope="module")
def start(bases, tmp_path_factory):
    """A runs folder whose SFT run of Walk has random adapters: what a run starts from, without the time of SFT."""
    runs = tmp_path_factory.mktemp("start") / "runs"
    args = rl_args(*walk_options(bases["gpt2"], runs))
    folder, model = sft.folder_of(args), make_players(bases["gpt2"]).model
    for stage in ("reflect", "policy", "plain"):
        reflect_rl.save_adapter(model, stage.replace("plain", "policy"), folder / stage)
    plumbing.runs.write(folder / "config.json", json.dumps(plumbing.runs.settings_of(sft.sft_args(args))))
    return runs


def walk_options(base, runs, *more):
    """The command line of a run of a second or two on Walk."""
    where = ["--env", "test_rl:Walk", "--base", base, "--runs", runs, "--device", "cpu"]
    size = ["--max-reflection", 6, "--updates", 6, "--episodes", 8, "--eval-every", 3, "--repeats", 1]
    return [str(option) for option in [*where, *size, *more]]


# ---------------------------------------------------------------------------------------------------------
# Returns and advantages


def time_baseline_by_hand(returns):
    found = []
    for i, row in enumerate(returns):
        others = [other for j, other in enumerate(returns) if j != i]
        for t, G in enumerate(row):
            same_time = [other[t] for other in others if len(other) > t]
            anywhere = [value for other in others for value in other]
            found.append(G - statistics.mean(same_time or anywhere or [0.0]))
    return found


def test_the_time_baseline_is_the_mean_of_the_others():
    """Bugs: the own return in its baseline, short episodes counted as zeros, an episode alone at a time step that
    learns nothing."""
    rng = random.Random(0)
    rows = [[rng.gauss(0, 1) for _ in range(rng.randrange(1, 7))] for _ in range(8)] + [[5.0] * 9]
    for returns in (rows, [[1.0, 2.0, 3.0], [3.0]], [[2.0, 1.0]]):
        assert sum(rl.time_baseline(returns), []) == pytest.approx(time_baseline_by_hand(returns))
    assert all(rl.time_baseline([[0.0] * 4, [3.0]])[0]), "the last steps are alone, and learn"


def test_group_advantages_equal_their_formulas():
    """Bugs: the own return in RLOO's mean, the other standard deviation; rounding blown up where all are equal."""
    returns = [1.0, 5.0, 2.0, 7.0]
    others = [statistics.mean(returns[:i] + returns[i + 1 :]) for i in range(4)]
    assert rl.group_advantages(returns, "rloo") == pytest.approx([returns[i] - others[i] for i in range(4)])
    z = [(G - statistics.mean(returns)) / statistics.stdev(returns) for G in returns]
    assert rl.group_advantages(returns, "grpo") == pytest.approx(z, rel=1e-3)
    for algo, (value, size) in itertools.product(("rloo", "grpo"), ((-31.7, 3), (13.3, 7), (0.7, 7))):
        assert rl.group_advantages([value] * size, algo) == pytest.approx([0.0] * size, abs=1e-10)


# ---------------------------------------------------------------------------------------------------------
# Episodes of real players, and what they are worth


@pytest.fixture(scope="module")
def played(bases):
    """Episodes of random-ish play, twelve of each of three tasks."""
    tasks = [task for task in Walk().tasks("train")[:3] for _ in range(12)]
    return play(make_players(bases["gpt2"]), Walk, tasks, seed=3, batch=5)


@pytest.fixture
def walks(played):
    """The same, to be changed. They end in every way, and some menus have an action less: nothing is tested on air."""
    ends = {(episode.success, episode.terminated, episode.truncated) for episode in played}
    assert ends == {(True, True, False), (False, True, False), (False, False, True)}
    assert {len(step.actions) for episode in played for step in episode.steps} == {3, 4}
    return copy.deepcopy(played)


@pytest.fixture
def learner(bases, start):
    """`learner(*options)`: players, options, critic and optimizer of a run of Walk."""

    def make(*options):
        args, players = rl_args(*walk_options(bases["gpt2"], start), *options), make_players(bases["gpt2"])
        players.micro_batch = args.micro_batch
        critic, _, optimizer = rl.make_learner(args, players, sft.adapters(args))
        return SimpleNamespace(players=players, args=args, critic=critic, optimizer=optimizer)

    return make


def all_steps(episodes):
    return [step for episode in episodes for step in episode.steps]


def scaled(values):
    return [value / statistics.pstdev(values) for value in values]


@pytest.mark.parametrize("algo", ["reinforce", "rloo", "grpo", "paper"])
def test_advantages_of_each_algorithm(algo, walks, learner):
    """Bugs: groups mixed up, an advantage of another step or episode, no scaling or one too many, a lost weight; the
    paper's discounted, or with a baseline."""
    this, gamma = learner("--algo", algo), 1.0 if algo == "paper" else 0.97
    togo = []
    for episode in walks:
        rewards = [step.reward for step in episode.steps]
        togo.append([sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))])
    if algo == "reinforce":
        expected = scaled(time_baseline_by_hand(togo))
    elif algo == "paper":
        expected = sum(togo, [])
    else:
        expected = []
        for i, episode in enumerate(walks):
            group = [togo[j][0] for j in range(i // 4 * 4, i // 4 * 4 + 4)]
            A = rl.group_advantages(group, algo)[i % 4]
            expected += [A] * len(episode.steps)
        expected = scaled(expected) if algo == "rloo" else expected
    steps = all_steps(walks)
    for i, step in enumerate(steps):
        step.weight = 1.0 - 0.5 * (i % 2)
    rl.give_advantages(walks, this.args, this.players, None)
    found = [step.advantage / step.weight for step in steps]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4) and len(set(found)) > 5


def test_ppos_advantages_and_targets(walks, learner, monkeypatch):
    """By GAE's definition. Bugs: the horizon taken for an end of the task, or an end for the horizon (both at once is
    an end: Gymnasium's time limit says so); advantages not centered; targets made of the scaled ones."""
    monkeypatch.setattr(rl, "values_of", lambda steps, players, critic: [len(step.prompt) / 100 for step in steps])
    this, advantages, values = learner("--algo", "ppo"), [], []
    next(episode for episode in walks if episode.success).truncated = True
    for episode in walks:
        V = [len(step.prompt) / 100 for step in episode.steps]
        [last] = this.players.steps([episode.state], [episode.actions])
        V.append(0.0 if episode.terminated else len(last.prompt) / 100)
        delta = [step.reward + 0.97 * V[t + 1] - V[t] for t, step in enumerate(episode.steps)]
        n, decay = len(delta), 0.97 * 0.95
        advantages += [sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        values += V[:-1]
    figures, steps = rl.give_advantages(walks, this.args, this.players, None), all_steps(walks)
    targets = [A + V for A, V in zip(advantages, values, strict=True)]
    assert [step.target for step in steps] == pytest.approx(targets, abs=1e-6)
    centered = [A - statistics.mean(advantages) for A in advantages]
    assert [step.advantage for step in steps] == pytest.approx(scaled(centered), abs=1e-4)
    unexplained = statistics.pvariance(advantages) / statistics.pvariance(targets)
    assert figures == {"explained_variance": pytest.approx(1 - unexplained, abs=1e-4)}


# ---------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.19, 1.21, 2.0])
@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_clipping_kills_the_gradient_only_where_it_went_far_enough(ratio, advantage):
    """No gradient beyond the clip on the advantage's side; all of it elsewhere. Bug: maximum for minimum."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    rl.clipped_loss(log_prob, torch.zeros(1), torch.tensor([advantage])).backward()
    dead = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert log_prob.grad.item() == pytest.approx(0.0 if dead else -advantage * ratio)


# ---------------------------------------------------------------------------------------------------------
# The update


class Recorder:
    """An optimizer that keeps gradients and learning rates, and moves nothing."""

    def __init__(self, optimizer):
        self.param_groups, self.gradients, self.rates = optimizer.param_groups, [], []

    def step(self):
        self.rates.append([group["lr"] for group in self.param_groups])
        self.gradients.append([torch.cat([p.grad.flatten() for p in group["params"]]) for group in self.param_groups])

    def zero_grad(self):
        for p in [p for group in self.param_groups for p in group["params"]]:
            p.grad = None


def alone(players, step, adapter="policy"):
    """One prompt by itself, no padding, the whole vocabulary, the model's own forward: `(log-probs, features)`."""
    reflect_rl.use_adapter(players.model, adapter)
    ids = torch.tensor([players.tokenizer(step.prompt)["input_ids"]])
    output = players.model(ids, output_hidden_states=True, use_cache=False)
    return output.logits[0, -1, list(step.label_ids)].log_softmax(-1), output.hidden_states[-1][0, -1]


def by_hand(this, steps, beta):
    """Loss and figures of a batch: the definitions, step by step."""
    total, figures = 0.0, Counter()
    for step in steps:
        log_probs, features = alone(this.players, step)
        p, A = log_probs.exp(), step.advantage
        ratio = (log_probs[step.action] - step.log_prob).exp()
        if this.args.algo in ("ppo", "grpo"):
            loss = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
            figures["approx_kl"] += (ratio - 1 - ratio.log()).item() / len(steps)
            figures["clip_fraction"] += (abs(ratio.item() - 1) > 0.2) / len(steps)
        else:
            loss = -A * log_probs[step.action]
        with torch.no_grad():
            reference, _ = alone(this.players, step, "sft")
        kl, entropy = (p * (log_probs - reference)).sum(), -(p * log_probs).sum()
        figures["kl_sft"] += kl.item() / len(steps)
        figures["entropy"] += entropy.item() / len(steps)
        loss = loss - beta * entropy + 0.5 * kl
        if this.critic:
            loss = loss + 0.5 * (this.critic(features[None])[0] - step.target) ** 2
        total = total + loss / len(steps)
    return total, figures


@pytest.mark.parametrize("clip_norm", [0.01, 1e9], ids=["clipped", "whole"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_update_is_the_gradient_of_the_whole_batch(algo, clip_norm, walks, learner, monkeypatch):
    """Bugs: means of unequal micro-batches averaged, a term with a wrong sign or scale, advantages of other steps, a
    padding that shows; figures of the last micro-batch only, or of the gradient after clipping."""
    monkeypatch.setattr(rl, "CLIP_NORM", clip_norm)
    for micro_batch in (1, 7, 1000):
        this = learner("--algo", algo, "--kl", 0.5, "--entropy", 0.1, "--micro-batch", micro_batch)
        this.args.minibatches = 1
        if micro_batch == 1:
            torch.nn.init.normal_(p := next(iter(adapter_parameters(this.players.model, "sft"))))
            elsewhere, steps = p.detach().clone(), all_steps(walks[:9])
            rl.give_advantages(walks[:8], this.args, this.players, this.critic)
            for i, step in enumerate(steps):  # ratios on both sides of the clip
                step.log_probs = [log_prob + 0.5 - i / len(steps) for log_prob in step.log_probs]
            total, expected = by_hand(this, steps, 0.1)
            groups = [group["params"] for group in this.optimizer.param_groups]
            gradients = [torch.autograd.grad(total, group, retain_graph=True) for group in groups]
            gradients = [torch.cat([g.flatten() for g in group]) for group in gradients]
            expected["grad_norm"] = gradients[0].norm().item()
        with torch.no_grad():
            next(iter(adapter_parameters(this.players.model, "sft"))).copy_(elsewhere)
        recorder = Recorder(this.optimizer)
        figures = rl.update(steps, this.players, this.critic, recorder, this.args, 0)
        assert figures == pytest.approx(dict(expected), rel=1e-3, abs=1e-5)
        assert len(gradients) == (2 if algo == "ppo" else 1) == len(recorder.gradients[0])
        for found, gradient in zip(recorder.gradients[0], gradients, strict=True):
            torch.testing.assert_close(found, gradient * min(1.0, clip_norm / gradient.norm()), atol=2e-6, rtol=1e-3)


def test_minibatches_cover_every_step_once_an_epoch(walks, learner, monkeypatch):
    """Bugs: steps left out or seen twice, the same cut in each epoch; an early stop that never or always fires; the
    last step's gradient norm in place of all."""
    this, seen, real = learner("--algo", "ppo"), [], rl.loss_of
    norms, policy, clip = [], adapter_parameters(this.players.model, "policy"), torch.nn.utils.clip_grad_norm_

    def clipped(parameters, most):
        norm = clip(parameters, most)
        if parameters[0] is policy[0]:
            norms.append(norm.item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(rl, "loss_of", lambda steps, *rest: seen.extend(map(id, steps)) or real(steps, *rest))
    steps = all_steps(walks)
    rl.give_advantages(walks, this.args, this.players, this.critic)
    for target, epochs in ((1e9, 3), (1e-12, 1)):
        monkeypatch.setattr(rl, "TARGET_KL", target)
        seen.clear()
        before = copy.deepcopy(this.optimizer.state_dict()["state"].get(0, {"step": 0})["step"])
        norms.clear()
        figures = rl.update(steps, this.players, this.critic, this.optimizer, this.args, 0)
        assert this.optimizer.state_dict()["state"][0]["step"] - before == 2 * epochs
        assert figures["grad_norm"] == pytest.approx(statistics.fmean(norms)) and len(norms) == 2 * epochs
        assert len(seen) == epochs * len(steps)
        passes = [seen[i : i + len(steps)] for i in range(0, len(seen), len(steps))]
        assert all(sorted(p) == sorted(map(id, steps)) for p in passes)
        assert len({frozenset(p[: len(steps) // 2]) for p in passes}) == epochs, "always the same halves"


def test_learning_rate_and_entropy_bonus_follow_their_schedules(walks, learner, monkeypatch):
    """By hand: up over a tenth of the run, down to a fifth; the bonus to 0. Bug: the value of the update before."""
    this, bonuses, real = learner("--algo", "ppo", "--updates", 40, "--rl-lr", 0.5, "--entropy", 0.2), [], rl.loss_of
    monkeypatch.setattr(rl, "loss_of", lambda *rest: bonuses.append(rest[4]) or real(*rest))
    this.args.epochs = this.args.minibatches = 1
    recorder, steps = Recorder(this.optimizer), walks[0].steps[:1]
    for number in (0, 1, 3, 20, 39):
        rl.update(steps, this.players, this.critic, recorder, this.args, number)
    shares = [0.25, 0.5 * 0.98, 0.94, 0.6, 0.22]
    assert recorder.rates == [pytest.approx([0.5 * share, 3e-3 * share]) for share in shares]
    assert bonuses == pytest.approx([0.2, 0.195, 0.185, 0.1, 0.005])


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_only_the_policy_learns(algo, walks, learner):
    """Bug: reflector, SFT policy or base get a gradient or move; everything else is bit for bit what it was."""
    this = learner("--algo", algo, "--rl-lr", 0.1, "--kl", 0.1)
    before = {name: p.detach().clone() for name, p in this.players.model.named_parameters()}
    rl.give_advantages(walks, this.args, this.players, this.critic)
    for number in range(2):
        rl.update(all_steps(walks), this.players, this.critic, this.optimizer, this.args, number)
    assert {name.rpartition(".")[2] for name in before} >= {"policy", "reflect", "sft", "weight"}
    for name, p in this.players.model.named_parameters():
        if name.endswith(".policy"):
            assert not torch.equal(p, before[name]), f"{name} did not move"
        else:
            assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad, f"{name} moved"


def test_the_critic_learns_and_never_moves_the_policy(walks, learner):
    """Without advantage and bonus its loss is the only one. Bug: it reaches the LoRA weights through the features."""
    this = learner("--algo", "ppo", "--entropy", 0)
    policy = [p.detach().clone() for p in adapter_parameters(this.players.model, "policy")]
    steps, errors = all_steps(walks), []
    rl.give_advantages(walks, this.args, this.players, this.critic)
    for number in range(8):
        values = rl.values_of(steps, this.players, this.critic)
        errors.append(sum((value - step.target) ** 2 for value, step in zip(values, steps, strict=True)))
        for step in steps:
            step.advantage = 0.0
        rl.update(steps, this.players, this.critic, this.optimizer, this.args, number % 6)
    assert all(map(torch.equal, policy, adapter_parameters(this.players.model, "policy")))
    assert errors[-1] < 0.9 * errors[0]
    one = [this.critic(alone(this.players, step)[1][None]).item() for step in steps[:5]]
    assert rl.values_of(steps, this.players, this.critic)[:5] == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_single_step_is_a_batch_and_a_gradient_must_be_finite(algo, walks, learner, monkeypatch):
    """Bugs: the standard deviation of one number is NaN; NaN goes into weights and moments."""
    this = learner("--algo", algo)
    one = [next(episode for episode in walks if len(episode.steps) == 1)]
    rl.give_advantages(one, this.args, this.players, this.critic)
    figures = rl.update(one[0].steps, this.players, this.critic, this.optimizer, this.args, 0)
    assert all(map(math.isfinite, figures.values()))
    before = [p.detach().clone() for p in adapter_parameters(this.players.model, "policy")]
    one[0].steps[0].advantage = math.nan
    with pytest.raises(UserError, match="update 2: the gradient is not finite; try a smaller --rl-lr"):
        rl.update(one[0].steps, this.players, this.critic, this.optimizer, this.args, 1)
    assert all(map(torch.equal, before, adapter_parameters(this.players.model, "policy")))


class Arms(envs.Env):
    """A two-armed bandit: the arm that the untrained policy likes less pays."""

    paying = 0

    def reset(self, *, seed=None, options=None):
        return "two arms", {"actions": ("left", "right"), "success": False}

    def step(self, action):
        success = action == self.paying
        return "over", float(success), True, False, {"actions": ("left", "right"), "success": success}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_bandit_is_learned(algo, learner, monkeypatch):
    """Bug: a sign error anywhere between the reward and the weights."""
    this = learner("--algo", algo, "--rl-lr", 1e-2, "--episodes", 16, "--entropy", 0, "--updates", 40)
    this.players.reflection = False
    monkeypatch.setattr(rl, "CLIP_NORM", 10.0)

    def probability():
        steps = this.players.steps(["two arms"], [("left", "right")])
        this.players.score(steps)
        return math.exp(steps[0].log_probs[Arms.paying])

    monkeypatch.setattr(Arms, "paying", int(probability() > 0.5))
    for number in range(4, 34):
        episodes = play(this.players, Arms, [0] * 16, numbers=range(16 * number, 16 * number + 16))
        rl.give_advantages(episodes, this.args, this.players, this.critic)
        rl.update(all_steps(episodes), this.players, this.critic, this.optimizer, this.args, number)
    assert probability() > 0.9


# ---------------------------------------------------------------------------------------------------------
# Replay


@pytest.mark.parametrize("algo", ["reinforce", "ppo", "paper"])
def test_replayed_steps_weigh_at_most_one(algo, walks, learner):
    """min(1, pi / mu), in the paper 1, and the ratio begins at 1 again. Bugs: mu's log-probs go into PPO's ratio, the
    buffer's own episodes change, the weight is lost on its way to the loss."""
    this = learner("--algo", algo, "--replay", 4)
    buffer, before, weights = deque(), {}, set()
    for episode in walks:
        before[tuple((step.state, step.action) for step in episode.steps)] = [step.log_prob for step in episode.steps]
        for step in episode.steps:  # as if mu had thought otherwise, in turn more and less of it
            shift = 0.4 * (-1) ** (len(step.state) + step.action)
            step.log_probs = [log_prob + shift for log_prob in step.log_probs]
        buffer.append(dataclasses.asdict(episode))
    kept = copy.deepcopy(buffer)
    episodes = rl.replayed(buffer, this.players, this.args, 0)
    assert len(episodes) == 4 < len(buffer) and buffer == kept
    for episode in episodes:
        pi = [step.log_prob for step in episode.steps]
        assert pi == pytest.approx(before[tuple((step.state, step.action) for step in episode.steps)], abs=1e-5)
        expected = [min(1.0, math.exp(-0.4 * (-1) ** (len(step.state) + step.action))) for step in episode.steps]
        expected = [1.0] * len(expected) if algo == "paper" else expected
        assert [step.weight for step in episode.steps] == pytest.approx(expected, abs=1e-4)
        weights.update(expected)
    assert len(weights) == (1 if algo == "paper" else 2)
    assert all(step.weight == 1.0 for step in all_steps(walks)), "what was just played has weight 1"


# ---------------------------------------------------------------------------------------------------------
# Whole runs, on Walk


@pytest.fixture
def options(start, bases, tmp_path):
    """`options(*more)`: the command line of a run in this test's folder, whose SFT is done."""

    def make(*more, runs="runs"):
        folder = shutil.copytree(start, tmp_path / runs, dirs_exist_ok=True)
        return walk_options(bases["gpt2"], folder, *more)

    return make


@pytest.fixture
def trained(monkeypatch):
    """`trained(options)`: the folder of the run that `python rl.py options` leaves."""

    def run(options):
        random.seed(time.time())  # no draw may depend on these
        torch.manual_seed(int(time.time()))
        sft.permutation.cache_clear()  # as in a new process
        run_script(rl, *options, monkeypatch=monkeypatch)
        [folder] = Path(options[options.index("--runs") + 1]).glob("*-rl-*")
        return folder

    return run


def same(one, other):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_equal_runs(one, other):
    """Log, adapters and the whole last checkpoint are the same, number by number."""
    assert read_log(one) == read_log(other) != []
    for path in one.rglob("adapter_model.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), f"{path} differs"
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other)]
    assert not [key for key in states[0] if not same(states[0][key], states[1][key])]


def test_what_a_run_leaves(options, trained, capsys, monkeypatch):
    """Bugs: figures that are missing or of other episodes; a reflector that moved; `eval.py` that prints another line
    than the one that `rl.py` ended with; a viewer without probabilities; a finished run that is played on."""
    played, real = [], rl.play_together
    monkeypatch.setattr(rl, "play_together", lambda *rest: played.append(real(*rest)) or played[-1])
    saved, save = [], plumbing.runs.Run.save
    monkeypatch.setattr(plumbing.runs.Run, "save", lambda *rest, **more: saved.append(rest[1]) or save(*rest, **more))
    more = options("--algo", "ppo", "--kl", 0.1)
    run = trained(more)
    assert saved == [1, 2, 3, 4, 5, 6], "a kill loses one update and no more"
    table = table_of(capsys.readouterr().out)
    assert table[run.name][:3] == ["-"] * 3, "the SFT run that it began with does not say what it was made of"
    before, *lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert before["step"] == before["episodes"] == 0 and 0 <= before["valid_success"] <= 1
    keys = {"step", "episodes", "stage", "return", "success", "length", "failed", "entropy", "approx_kl", "kl_sft"}
    keys |= {"clip_fraction", "grad_norm", "explained_variance", "cache_hits", "cut_reflections", "episodes_per_s"}
    for number, (line, episodes) in enumerate(zip(lines, played, strict=True)):
        panel = {"valid_success", "valid_episodes"} if number in (2, 5) else set()
        assert set(line) == keys | panel and line["step"] == number + 1 and line["episodes"] == 8 * number + 8
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["success"] == sum(episode.steps[-1].reward == 1.0 for episode in episodes) / 8
        assert line["failed"] == sum(episode.steps[-1].reward == -0.5 for episode in episodes) / 8
        assert line["length"] == len(all_steps(episodes)) / 8
        assert line["return"] == pytest.approx(sum(step.reward for step in all_steps(episodes)) / 8)
        assert line["approx_kl"] > 1e-9 and 0 < line["entropy"] < math.log(4) + 1e-6
    assert [line["stage"] for line in lines] == ["near"] * 3 + ["far"] * 3
    [first] = run.parent.glob("walk-sft-s0-*")
    for name, equal in (("reflect", True), ("policy", False)):
        files = [load_file(folder / name / "adapter_model.safetensors") for folder in (first, run)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0]) == equal, name
    assert list(table) == ["random", "expert", *[f"{first.name} {w} reflection" for w in ("without", "with")], run.name]

    where = [*more[:8], "--run", run]
    run_script(evaluation, *where, "--repeats", 1, monkeypatch=monkeypatch)
    assert table_of(capsys.readouterr().out) == {run.name: table[run.name]}
    run_script(reflect_rl, *where, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "# Analyze:" in out and "after" in out.splitlines()[-1] and out.count("%") >= 3

    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists already: go on with --resume, or give another --name"):
        trained(more)
    with pytest.raises(UserError, match="other settings: updates 6, now 7, episodes 8, now 16"):
        trained([*more, "--resume", "--updates", 7, "--episodes", 16])
    with pytest.raises(UserError, match="other settings: seed 0, now 1"):  # before another SFT, for which Walk has no
        trained([*more, "--resume", "--seed", 1, "--name", run.name])  # teacher
    trained([*more, "--resume", "--micro-batch", 8])
    assert contents == {path: path.read_bytes() for path in contents}


def test_names_of_runs(options, trained, capsys, monkeypatch):
    """Bugs: an ablation that takes another's name, or does nothing; a name that leads out of the folder."""
    more = options("--no-reflection", "--no-curriculum", "--updates", 1, "--eval-every", 0)
    run = trained(more)
    assert run.name == "walk-rl-no-reflection-no-curriculum-s0" in table_of(capsys.readouterr().out)
    assert [line["stage"] for line in read_log(run)] == ["all"] and not (run / "reflect").exists()
    assert not torch.load(run / "checkpoint.pt", weights_only=True)["more"]["reflections"]
    args = rl_args("--no-negatives", "--algo", "ppo", "--replay", 2)
    assert rl.run_name(args) == "taxi-rl-ppo-no-negatives-replay-s0"
    args = rl_args("--no-sft", "--no-milestone", "--algo", "paper", "--episodes", 12)
    assert rl.run_name(args) == "taxi-rl-paper-no-sft-no-milestone-s0" and args.replay == 12
    with pytest.raises(UserError, match="^--kl [^\n]*--no-sft$"):
        rl_args("--no-sft", "--kl", 0.1)
    assert rl.run_name(rl_args("--seed", 3, "--env", "alfworld", "--name", "mine")) == "mine"
    for name in ("../mine", "/tmp/mine", "a/b", "..", "."):
        with pytest.raises(UserError, match="must stay inside"):
            rl.run_name(rl_args("--name", name))


@pytest.mark.parametrize("more, updates", [([], 2), (["--no-reflection", "--algo", "ppo"], 12)])
def test_without_sft_the_policy_starts_as_the_base(more, updates, options, monkeypatch):
    """Bugs: a policy of SFT, or one with random B matrices; a reflector that is lost, or an SFT run that is needed
    where nothing of it plays; a budget without RL; rows of another split."""
    played, real = [], rl.play_together
    monkeypatch.setattr(rl, "play_together", lambda *rest: played.append(real(*rest)) or played[-1])
    args = rl_args(*options("--no-sft", "--updates", 2, "--eval-every", 0, *more))
    first, run = sft.folder_of(args), Path(args.runs) / rl.run_name(args)
    for name in ("policy", "plain") if args.reflection else ("",):
        shutil.rmtree(first / name)
    if args.reflection:
        plumbing.runs.write_budget(first / "reflect", 50, 30)
    [row], [other] = rl.pipeline(args, ("valid", "test"))
    base = reflect_rl.load_players(args, {})
    for step in all_steps(played[0]):
        assert step.log_probs == pytest.approx(alone(base, step, None)[0].tolist(), abs=1e-4)
        assert (step.reflection is not None) == args.reflection
    assert first.exists() == (run / "reflect").exists() == args.reflection and (run / "policy").exists()
    known = {"records": 50, "updates": 30 + updates} if args.reflection else {"records": 0, "updates": updates}
    assert row["budget"] == other["budget"] == [{**known, "episodes": 16}] and row["name"] == run.name
    assert [row["split"], other["split"]] == ["valid", "test"] and row["sampled"] != other["sampled"]
    if args.reflection:
        assert same(*(load_file(folder / "reflect" / "adapter_model.safetensors") for folder in (first, run)))


AUTHORS = ["--algo", "paper"]


@pytest.mark.parametrize(
    "more, name, stage",
    [
        ([], "ours", {"near": 1, "milestone": 0.5}),
        (["--no-milestone"], "ours", {"near": 1}),
        (AUTHORS, "theirs", {"milestone": 1.05}),
        ([*AUTHORS, "--no-milestone"], "theirs", {}),
    ],
)
def test_stages_are_those_of_the_options(more, name, stage, options, trained, monkeypatch):
    """Bugs: an ablation that does nothing, the authors' algorithm on our stages, a run that its own options refuse to
    resume."""
    monkeypatch.setattr(Walk, "curriculum", ())
    monkeypatch.setitem(curriculum.CURRICULA, Walk, [("ours", 1.0, {"near": 1, "milestone": 0.5})])
    monkeypatch.setitem(curriculum.AUTHORS, Walk, [("theirs", 1.0, {"milestone": 1.05})])
    calls, real = [], rl.play
    monkeypatch.setattr(rl, "play", lambda *rest: calls.append(rest[3]) or real(*rest))
    more = options(*more, "--updates", 2, "--eval-every", 0)
    run = trained(more)
    assert calls == [stage] * 2 and [line["stage"] for line in read_log(run)] == [name] * 2
    assert trained([*more, "--resume"]) == run and len(calls) == 2


def test_another_micro_batch_gives_the_same_run(options, trained, monkeypatch):
    """Bug: a forward pass that forgets the limit (PPO's last states, held-out records), or a result that depends."""
    rows, real = [], reflect_rl.Players.check_length
    monkeypatch.setattr(
        reflect_rl.Players, "check_length", lambda *ids, **room: rows.append(ids[1]) or real(*ids, **room)
    )
    more = ("--algo", "ppo", "--replay", 4, "--updates", 2)
    one = trained(options(*more, runs="one"))
    assert max(map(len, rows)) > 3
    rows.clear()
    other = trained(options(*more, "--micro-batch", 3, runs="other"))
    assert max(map(len, rows)) == 3
    assert_close_runs(one, other)


def test_every_episode_is_drawn_anew(options, trained, monkeypatch):
    """Bugs: each update with the tasks or the random numbers of the last; groups torn apart; a stage's options lost, or
    winning over the command line's."""
    calls, real = [], rl.play
    monkeypatch.setattr(rl, "play", lambda *rest: calls.append(rest[2:]) or real(*rest))
    more = options("--algo", "rloo", "--updates", 4, "--eval-every", 0)
    trained(more)
    adapters = sft.adapters(rl_args(*more, "--resume"))
    rl.train(rl_args(*more, "--name", "mine", "--env-option", "near=0"), adapters)
    assert [options for _, options, *_ in calls[4:]] == [{}] * 4
    tasks, stages, seeds, numbers = zip(*calls[:4], strict=True)
    assert all(group == [group[0]] * 4 for drawn in tasks for group in (drawn[:4], drawn[4:]))
    assert len({str(drawn) for drawn in tasks}) == 4 and {task["number"] for task in sum(tasks, [])} <= set(range(12))
    assert sum(numbers, []) == list(range(32)) and seeds == (0,) * 4
    assert stages == ({"near": 1}, {"near": 1}, {}, {})


def test_the_buffer_is_of_this_stage_only(options, trained, monkeypatch):
    """Bug: successes of an easier stage replayed in a later one; failures kept; a buffer that is not saved."""
    sizes, real = [], rl.replayed
    monkeypatch.setattr(rl, "replayed", lambda buffer, *rest: sizes.append(len(buffer)) or real(buffer, *rest))
    run = trained(options("--replay", 3))
    won = [round(8 * line["success"]) for line in read_log(run)]
    assert sizes == [0, won[0], won[0] + won[1], 0, won[3], won[3] + won[4]] and won[0] and won[3]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["more"]["buffer"]
    assert len(saved) == sum(won[3:]) and all(episode["success"] for episode in saved)


def test_warnings(capsys):
    """Bug: a run that cannot learn, silently; or one that cries all the time."""

    def warnings(totals, **figures):
        episodes = [SimpleNamespace(total=total) for total in totals]
        figures = {"step": 1, "stage": "all", "success": 0.5, "return": 0, "length": 2, "entropy": 0.7} | figures
        bar = SimpleNamespace(update=lambda: None, set_postfix=lambda **rest: None)
        rl.report(SimpleNamespace(log=lambda line: None), figures, episodes, bar)
        return capsys.readouterr().out

    assert warnings([1.0, 0.5]) == ""
    assert "every episode had the same return" in warnings([0.1 + 0.2, 0.3])
    assert "the policy has stopped exploring" in warnings([1.0, 0.5], entropy=0.001)
    assert warnings([1.0, 0.5], entropy=0.001, success=1.0) == "", "an exact policy that succeeds is no trouble"


# ---------------------------------------------------------------------------------------------------------
# Resume


def kill_at(number, monkeypatch):
    """Die at the `number`-th of all moments that matter: half a file written, renamed or not, logged or not."""
    left, half = [number], Path.write_bytes

    def dying(real, first):
        def call(*rest, **more):
            left[0] -= 1
            if left[0] == 0:
                first(*rest)
                raise Killed
            return real(*rest, **more)

        return call

    moments = [(Path, "replace"), (Path, "unlink"), (plumbing.runs.Run, "log"), (rl, "give_advantages")]
    for owner, name in [*moments, (torch.nn.utils, "clip_grad_norm_"), (rl, "save_adapter"), (sft, "save_adapter")]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name), lambda *rest: None))
    monkeypatch.setattr(Path, "write_bytes", dying(half, lambda path, data: half(path, data[: len(data) // 2])))
    monkeypatch.setattr(torch, "save", dying(torch.save, lambda state, path: half(path, b"PK\x03\x04half")))


def kill_often(options, moments, trained, monkeypatch):
    """Start a run, kill it at each of these moments after a start, and go on until it is done."""
    for moment in [*moments, None]:
        with monkeypatch.context() as patch:
            if moment is not None:
                kill_at(moment, patch)
            try:
                return trained([*options, "--resume"])
            except Killed:
                pass
        gc.collect()  # the lock goes with its process
        for log in Path(options[options.index("--runs") + 1]).rglob("log.jsonl"):
            if not (log.parent / "adapter_config.json").exists():  # the log of a finished stage is left alone
                with log.open("a") as file:  # what a kill may leave: lines after the checkpoint, half a line
                    file.write('{"step": 77, "success": 1.0}\n{"step": 1, "succ')


@pytest.mark.parametrize("algo", ["reinforce", "rloo --no-sft", "grpo --kl 0.1", "ppo --replay 3"])
def test_a_resumed_run_equals_the_uninterrupted_one(algo, options, trained, monkeypatch):
    """Six updates, a new stage after three; kills at each moment of an update, then at random. Bugs: Adam's moments,
    the critic, the buffer, the memo, the stage or the tasks begin anew; a half-written file taken for whole; a log with
    lines twice."""
    rng, more = random.Random(algo), ["--algo", *algo.split()]
    whole = trained(options(*more, runs="whole"))
    moments = [9, *range(1, 8), *(rng.randrange(8, 25) for _ in range(2))]
    assert_equal_runs(whole, kill_often(options(*more, runs="cut"), moments, trained, monkeypatch))
    steps = [json.loads(line)["step"] for line in (whole.parent.parent / "cut" / whole.name / "log.jsonl").open()]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_the_whole_pipeline_resumes(bases, tmp_path, trained, monkeypatch):
    """Kills in SFT, too: in the data, between and within its stages."""
    rng = random.Random(0)
    whole, cut = ([*map(str, tiny_rl_options(bases["gpt2"], tmp_path / name))] for name in ("whole", "cut"))
    trained(whole)
    moments = [1, 2, *(rng.randrange(3, 30) for _ in range(6))]
    kill_often(cut, moments, trained, monkeypatch)
    for path in (tmp_path / "whole").glob("**/checkpoint.pt"):
        assert_equal_runs(path.parent, tmp_path / "cut" / path.parent.relative_to(tmp_path / "whole"))
    assert len(list((tmp_path / "cut").glob("**/checkpoint.pt"))) == 3


def test_an_other_process_leaves_the_log_alone(options, trained, monkeypatch):
    """Bug: under torchrun a slower process removes the log in which the first has written its first line."""
    run = trained(options("--updates", 1))
    (run / "checkpoint.pt").unlink()
    this, before = object.__new__(plumbing.runs.Run), (run / "log.jsonl").read_bytes()
    this.folder = run
    monkeypatch.setattr(plumbing.runs, "rank", lambda: 1)
    assert this.restore([], None) == (0, {}) and (run / "log.jsonl").read_bytes() == before


def test_a_second_process_is_refused(options, trained):
    """Bug: two processes write one run. The lock goes with its holder, or a killed run could not be resumed."""
    more = options("--updates", 1)
    run = Path(more[more.index("--runs") + 1]) / "walk-rl-s0"
    run.mkdir()
    with filelock.FileLock(run / ".lock"), pytest.raises(UserError, match="another process is writing .*walk-rl-s0"):
        trained(more)
    assert [path.name for path in run.iterdir()] == [".lock"], "the second process wrote something"
    assert trained(more) == run


# ---------------------------------------------------------------------------------------------------------
# Processes. They start from a fork server that has imported everything once.


def run_main(options, output, environment):
    """The body of such a process: `python rl.py options`, its output in a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a gate started with & and nohup ignores Ctrl-C
    sys.argv = ["rl.py", *options]
    torch.set_num_threads(1)
    envs.run_main(rl.main)


def start_process(body, *arguments):
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of the fork server, which outlives a fixture
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_rl"])
    process = context.Process(target=body, args=arguments)
    process.start()
    return process


def rendezvous(world):
    """The environment variables that torchrun gives to each of `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_together(options, folder, world=2):
    """A run of `world` processes to its end; what each printed."""
    outputs = [folder / f"out{rank}" for rank in range(world)]
    processes = []
    for output, environment in zip(outputs, rendezvous(world), strict=True):
        processes.append(start_process(run_main, options, output, environment))
    for process in processes:
        process.join()
    texts = [output.read_text() for output in outputs]
    assert {process.exitcode for process in processes} == {0}, "\n".join(texts)
    return texts


def assert_close_runs(one, other):
    """Every figure to 1e-5, every weight of the adapters to 1e-4."""
    lines, others = read_log(one), read_log(other)
    assert len(lines) == len(others) > 0
    for line, expected in zip(lines, others, strict=True):
        # Two processes may write the same text at the same time, and none is left out.
        assert 0 <= line.pop("cache_hits") <= 1 and expected.pop("cache_hits") >= 0
        assert line.pop("cut_reflections") >= expected.pop("cut_reflections")
        stage = line.pop("stage")
        assert stage == expected.pop("stage") and line == pytest.approx(expected, abs=1e-5, rel=1e-4)
    for name in ("reflect", "policy"):
        weights = [load_file(run / name / "adapter_model.safetensors") for run in (one, other)]
        torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reflection", [True, False])
def test_what_another_process_wrote_is_known(reflection, monkeypatch):
    """Bugs: a reflection that each process writes for itself; without a reflector, a memo of no texts."""
    players = SimpleNamespace(counts=Counter(), reflection=reflection, reflections={})
    step = reflect_rl.Step("a state", (), "a text" if reflection else None)
    monkeypatch.setattr(rl, "play", lambda *rest: [reflect_rl.Episode("task", steps=[step])])
    monkeypatch.setattr(rl, "world", lambda: 2)
    monkeypatch.setattr(rl, "gather", lambda value: [value, value])
    args = SimpleNamespace(episodes=2, seed=0)
    assert len(rl.play_together(players, None, ["task", "task"], {}, args, 0)) == 2
    assert players.reflections == ({"a state": "a text"} if reflection else {})


def test_figures_are_those_of_all_processes(monkeypatch):
    """Bug: the first one's reflections only."""
    monkeypatch.setattr(plumbing.processes, "gather", lambda counts: [counts, {"cuts": 2, "hits": 1}])
    assert plumbing.processes.total(Counter(cuts=1)) == {"cuts": 3, "hits": 1}


@pytest.mark.parametrize("algo", ["reinforce --replay 2", "ppo --kl 0.1"])
def test_processes_together_give_the_numbers_of_one(algo, options, trained, tmp_path, monkeypatch):
    """Three have unequal shares of eight episodes, and go on with what one began. Bugs: gradients averaged over
    unequal shares, an episode played twice or by nobody, figures of one process only, two that print."""
    more, world = ["--algo", *algo.split(), "--updates", 4], 3 if "ppo" in algo else 2
    one, many = trained(options(*more, runs="one")), options(*more, runs="many")
    if world == 3:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(9, patch)
            trained(many)
        gc.collect()
    printed = run_together([*many, "--resume"], tmp_path, world)
    assert_close_runs(tmp_path / "many" / one.name, one)
    assert [text.count("95% intervals") for text in printed] == [1, *[0] * (world - 1)]
    assert not any(text.strip() for text in printed[1:])


def leave(folder, environment):
    os.environ.update(environment)
    with plumbing.processes.joined_processes(SimpleNamespace(device="cpu")):
        if environment["RANK"] == "0":
            time.sleep(0.5)
            (folder / "done").touch()
    sys.exit(0 if (folder / "done").exists() and not dist.is_initialized() else 1)


def test_nobody_leaves_early_and_the_group_is_always_destroyed(tmp_path, monkeypatch):
    """Bugs: torchrun kills rank 0 in its evaluation because rank 1 has ended; a warning of PyTorch after an error."""
    processes = [start_process(leave, tmp_path, environment) for environment in rendezvous(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name, value in rendezvous(1)[0].items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    with pytest.raises(UserError, match="mine"), plumbing.processes.joined_processes(SimpleNamespace(device="cpu")):
        assert dist.is_initialized() and plumbing.processes.world() == 1
        raise UserError("mine")
    torch.set_num_threads(threads)
    assert not dist.is_initialized()


def test_torchrun_runs_the_whole_pipeline(bases, tmp_path):
    """`torchrun --nproc-per-node 2 rl.py`: SFT by one process, training by both, one table. Bug: it hangs."""
    options = [*tiny_rl_options(bases["gpt2"], tmp_path), "--updates", 2]
    out, _ = subprocess_of("-m", "torch.distributed.run", "--nproc-per-node", 2, "rl.py", *options, timeout=600)
    assert out.count("95% intervals") == out.count("records to learn from") == 1
    assert len(read_log(tmp_path / "corridor-rl-s0")) == 2


def test_python_rl_runs_the_whole_pipeline(bases, tmp_path):
    """`python rl.py`, tiny, on taxi: data, SFT, RL, evaluation, and a table at the end."""
    size = ["--trajectories", 6, "--reflect-steps", 2, "--policy-steps", 2, "--max-reflection", 12, "--device", "cpu"]
    more = ["--updates", 3, "--episodes", 4, "--eval-every", 0, "--repeats", 1, "--base", bases["gpt2"]]
    out, _ = subprocess_of("rl.py", "--runs", tmp_path, *size, *more)
    rows = table_of(out)
    assert [name[:11].strip() for name in rows] == ["random", "expert", "taxi-sft-s0", "taxi-rl-s0"]
    assert rows["expert"][3] == "100.0%" and float(rows["random"][3].rstrip("%")) < 20
    records = re.search(r"(\d+) records to learn from", out)[1]
    assert [row[:3] for row in rows.values()] == [["0"] * 3] * 2 + [[records, "4", "0"], [records, "7", "12"]]
    assert [line["stage"] for line in read_log(tmp_path / "taxi-rl-s0")] == ["pickup", "dropoff", "full"]


def test_interrupt_loses_at_most_one_update(options, trained, tmp_path):
    """Ctrl-C. Bugs: a traceback, what was played since the last evaluation is lost, the resumed run is another one."""
    more, run = options("--updates", 90, "--eval-every", 0), tmp_path / "runs" / "walk-rl-s0"
    process = start_process(run_main, more, tmp_path / "out", {})
    while process.is_alive() and not (run / "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    text = (tmp_path / "out").read_text()
    assert process.exitcode == 130 and text.splitlines()[-1] == "interrupted" and "Traceback" not in text, text
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert len(read_log(run)) - 1 <= saved < 90
    assert_equal_runs(trained(options("--updates", 90, "--eval-every", 0, runs="whole")), trained([*more, "--resume"]))


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills(seed, bases, tmp_path):
    """`kill -9` at random moments of SFT and RL; each resumed run must end equal to the uninterrupted one."""
    rng, more = random.Random(seed), ["--algo", "ppo", "--replay", 3, "--updates", 12]
    options = [*map(str, [*tiny_rl_options(bases["gpt2"], tmp_path / "whole"), *more])]
    began = time.monotonic()
    process = start_process(run_main, options, tmp_path / "out", {})
    process.join()
    duration, hits, runs = time.monotonic() - began, 0, []  # a finished run is followed by a new one
    while hits < 20 or process.exitcode:
        if process.exitcode == 0:
            runs.append(f"cut{len(runs)}")
        options[options.index("--runs") + 1] = str(tmp_path / runs[-1])
        process = start_process(run_main, [*options, "--resume"], tmp_path / "out", {})
        process.join(rng.uniform(0, duration) if hits < 20 else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), (tmp_path / "out").read_text()
        hits += process.exitcode == -9
    for path in (tmp_path / "whole").glob("**/checkpoint.pt"):
        for name in runs:
            assert_equal_runs(path.parent, tmp_path / name / path.parent.relative_to(tmp_path / "whole"))
