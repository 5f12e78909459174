"""The online stage: returns, losses and gradients by hand; whole runs that repeat, resume and survive a kill."""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal

import pytest
import torch
from conftest import ROOT, Killed, make_players, read_log, run_script, subprocess_of, table_of, tiny_rl_options
from corridor import Corridor
from safetensors.torch import load_file

import curriculum
import eval as evaluation
import reflect_rl
import rl
import sft
from envs import UserError
from reflect_rl import Episode, Step, adapter_parameters, lora_layers, play


def rl_args(*options):
    """The options of `rl.py`, resolved as its `main` does."""
    parser = argparse.ArgumentParser()
    reflect_rl.add_common_options(parser)
    sft.add_sft_options(parser)
    rl.add_rl_options(parser)
    evaluation.add_panel_options(parser.add_argument_group("evaluation"))
    args = parser.parse_args([str(option) for option in options])
    args.bf16 = False
    rl.resolve(args)
    return args


def test_warmup_is_a_tenth_of_the_run():
    """Catches a short run (ALFWorld: 25 updates) that warms up for nearly half of it, and a 0 that is overruled."""
    assert [rl_args("--updates", n).warmup for n in (100, 25, 5)] == [10, 2, 0]
    assert rl_args("--warmup", 0).warmup == 0 and rl_args("--warmup", 7, "--updates", 20).warmup == 7


# ---------------------------------------------------------------------------------------------------------
# Returns and advantages


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_to_go_equal_a_double_loop(gamma):
    """Catches returns from the start, a discount that is applied once too often, a reversed list."""
    rewards = [1.0, -2.0, 0.5, 0.0, 3.0]
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 5)) + gamma ** (5 - t) * 7 for t in range(5)]
    assert rl.returns_to_go(rewards, gamma, bootstrap=7.0) == pytest.approx(expected)
    assert rl.returns_to_go(rewards, gamma)[-1] == 3.0


@pytest.mark.parametrize("bootstrap", [0.0, 2.0])
def test_gae_equals_its_definition(bootstrap):
    """Catches a last step that reads the wrong value: the double sum of Schulman et al., equation 16."""
    rewards, values, gamma, lam = [1.0, 0.0, -1.0, 2.0], [0.5, -0.2, 0.3, 0.9], 0.9, 0.8
    after = [*values[1:], bootstrap]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 4)) for t in range(4)]
    assert rl.gae(rewards, values, bootstrap, gamma, lam) == pytest.approx(expected)
    togo = rl.returns_to_go(rewards, gamma, bootstrap)
    assert rl.gae(rewards, values, bootstrap, gamma, 1.0) == pytest.approx(
        [g - v for g, v in zip(togo, values, strict=True)]
    )


def test_baseline_is_taken_per_time_step():
    """Catches one baseline over all steps, and short episodes counted as zeros at late steps."""
    assert rl.time_baseline([[1.0, 2.0, 3.0], [3.0], [5.0, 4.0]]) == [[-2.0, -1.0, 0.0], [0.0], [2.0, 1.0]]


def test_group_advantages():
    """Catches groups by position in place of task, and a leave-one-out mean that counts itself."""
    returns, groups = [1.0, 5.0, 2.0, 7.0, 3.0], ["a", "b", "a", "b", "a"]
    assert rl.group_advantages(returns, groups, leave_one_out=True) == pytest.approx([1 - 2.5, -2, 2 - 2, 2, 3 - 1.5])
    assert rl.group_advantages(returns, groups, leave_one_out=False) == pytest.approx(
        [-1, -(0.5**0.5), 0, 0.5**0.5, 1], abs=1e-3
    )
    assert rl.group_advantages([4.0], ["alone"], leave_one_out=True) == [0.0]


# ---------------------------------------------------------------------------------------------------------
# Losses


def test_reinforce_gradient_of_a_two_armed_bandit():
    """Catches a wrong sign or mean. Arms drawn exactly as often as pi says: the gradient must be the analytic one of
    the
    expected reward, d/d theta_0 = pi_0 pi_1 (r_0 - r_1)."""
    theta = torch.tensor([0.0, math.log(3)], requires_grad=True)  # pi = 1/4, 3/4
    actions, reward = torch.tensor([0, 1, 1, 1]), torch.tensor([2.0, -1.0])
    loss = rl.policy_gradient_loss(theta.log_softmax(0)[actions], reward[actions], torch.ones(4))
    loss.backward()
    slope = 0.25 * 0.75 * (2.0 - -1.0)
    torch.testing.assert_close(-theta.grad, torch.tensor([slope, -slope]))


def test_baseline_leaves_the_expected_gradient_alone():
    """Catches a baseline that biases the gradient. Over all batches of two one-step episodes, weighted by probability,
    it is exactly half of the true one: an episode's own return is in the mean of the two."""
    theta, reward = torch.tensor([0.0, math.log(3)], requires_grad=True), [2.0, -1.0]
    p = theta.softmax(0).tolist()
    expected = torch.zeros(2)
    for actions in itertools.product(range(2), repeat=2):
        advantage = torch.tensor(rl.time_baseline([[reward[i]] for i in actions])).flatten()
        loss = rl.policy_gradient_loss(theta.log_softmax(0)[list(actions)], advantage, torch.ones(2))
        expected += p[actions[0]] * p[actions[1]] * torch.autograd.grad(loss, theta)[0]
    true = torch.autograd.grad(-(theta.softmax(0) * torch.tensor(reward)).sum(), theta)[0]
    torch.testing.assert_close(expected, true / 2, atol=1e-6, rtol=1e-5)


def test_mask_leaves_steps_out():
    """Catches a mean over all steps where only some count."""
    log_prob, advantage = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 2.0, 100.0])
    loss = rl.policy_gradient_loss(log_prob, advantage, torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx((1 * 1 + 2 * 2) / 2)


def test_entropy_with_masked_actions_is_exact():
    """Catches -inf * 0 = NaN, in the value or in the gradient, and entropy over invalid actions."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 9.0], [0.0, 0.0, 9.0, 9.0]], requires_grad=True)
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    found = rl.entropy(logits.masked_fill(~valid, -torch.inf).log_softmax(-1))
    expected = [
        torch.distributions.Categorical(logits=row[v]).entropy().item()
        for row, v in zip(logits.detach(), valid, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected) and found[1].item() == pytest.approx(math.log(2))
    found.sum().backward()
    free = logits.detach()[0, :3].requires_grad_()
    torch.distributions.Categorical(logits=free).entropy().backward()
    torch.testing.assert_close(logits.grad[0], torch.cat([free.grad, torch.zeros(1)]))
    assert torch.all(logits.grad[1].abs() < 1e-6)


def test_kl_equals_torchs():
    """Catches KL(q || p) for KL(p || q), and NaN where both are -inf."""
    p, q = torch.randn(5, 4).log_softmax(-1), torch.randn(5, 4).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(rl.kl_divergence(p, q), expected)
    wall = torch.full((5, 2), -torch.inf)
    torch.testing.assert_close(rl.kl_divergence(torch.cat([p, wall], 1), torch.cat([q, wall], 1)), expected)


def test_ppo_at_ratio_one_is_reinforce():
    """Catches a surrogate whose first gradient step is not the policy gradient."""
    advantage, mask = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    gradients = []
    for loss in (
        lambda p: rl.policy_gradient_loss(p, advantage, mask),
        lambda p: rl.ppo_loss(p, p.detach(), advantage, mask, 0.2),
    ):
        log_prob = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
        loss(log_prob).backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "ratio, advantage, moves",
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True)],
)
def test_ppo_clips_on_the_right_side(ratio, advantage, moves):
    """Catches min and max swapped: no gradient beyond the clip where going on would raise the surrogate, else there
    is."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    rl.ppo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2).backward()
    assert (log_prob.grad.item() != 0) == moves


# ---------------------------------------------------------------------------------------------------------
# One update of real players


def corridor_batch(players, args, n=8):
    learner = rl.Learner(players, args)
    episodes = play(players, Corridor, [random.Random(i).choice(Corridor().tasks("train")) for i in range(n)], seed=0)
    return learner, episodes, rl.make_batch(learner, episodes, args)


def advantages_by_hand(episodes, gamma):
    """REINFORCE's: return-to-go minus the mean at the same time, over the standard deviation."""
    G = [
        [sum(gamma ** (k - t) * e.steps[k].reward for k in range(t, len(e.steps))) for t in range(len(e.steps))]
        for e in episodes
    ]
    mean = [torch.tensor([g[t] for g in G if len(g) > t]).mean().item() for t in range(max(map(len, G)))]
    flat = torch.tensor([g_t - mean[t] for g in G for t, g_t in enumerate(g)])
    return flat / flat.std(correction=0)


def gradient_by_hand(players, episodes, args):
    """Of the whole loss, from the full model's logits of each step alone: no batch, no padding, no shared prompts."""
    steps, loss = [step for e in episodes for step in e.steps], 0.0
    reflect_rl.use_adapter(players.model, "policy")
    for step, advantage in zip(steps, advantages_by_hand(episodes, args.gamma), strict=True):
        ids = reflect_rl.encode(players.tokenizer, players.prompt(step.state, step.reflection, step.actions))
        row = players.model(torch.tensor([ids])).logits[0, -1, list(players.label_ids(step.actions))].log_softmax(-1)
        loss = loss - (advantage * row[step.action] - args.entropy * (row.exp() * row).sum()) / len(steps)
    parameters = adapter_parameters(players.model, "policy")
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("micro_batch", [1, 4, 1000])
def test_update_is_the_gradient_of_the_whole_batch(micro_batch, bases):
    """Catches wrong weights of micro-batches, advantages in another order than the steps, an entropy bonus with the
    wrong sign: one step of plain SGD against the gradient by hand."""
    players = make_players(bases["llama"])
    args = rl_args("--micro-batch", micro_batch, "--rl-lr", 1.0, "--clip", 1e9, "--entropy", 0.1, "--warmup", 0)
    batches = (corridor_batch(players, args, n) for n in (8, 7, 6, 5))
    learner, episodes, batch = next(b for b in batches if sum(len(e.steps) for e in b[1]) % 4)  # a smaller last one
    expected = gradient_by_hand(players, episodes, args)
    parameters = adapter_parameters(players.model, "policy")
    before = [p.detach().clone() for p in parameters]
    learner.optimizer = torch.optim.SGD(parameters, lr=1.0)
    figures = learner.update(batch, 0, left=1.0)
    for p, old, gradient in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(old - p.detach(), gradient, atol=2e-5, rtol=1e-3)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_logged_entropy_is_of_the_whole_batch(bases):
    """Catches figures of the last micro-batch only."""
    players = make_players(bases["llama"])
    args = rl_args("--micro-batch", 3)
    learner, episodes, batch = corridor_batch(players, args)
    steps = [step for e in episodes for step in e.steps]
    with torch.no_grad():
        prompts = [players.prompt(s.state, s.reflection, s.actions) for s in steps]
        rows = players.log_probs(prompts, [players.label_ids(s.actions) for s in steps])
    expected = -(rows.exp() * rows).sum(-1).mean().item()
    assert learner.update(batch, 0, left=1.0)["entropy"] == pytest.approx(expected, abs=1e-5)


def test_gradient_is_clipped(bases):
    """Catches a clip that is logged but not applied."""
    players = make_players(bases["llama"])
    args = rl_args("--rl-lr", 1.0, "--clip", 0.01, "--warmup", 0)
    learner, _, batch = corridor_batch(players, args)
    parameters = adapter_parameters(players.model, "policy")
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    learner.optimizer = torch.optim.SGD(parameters, lr=1.0)
    assert learner.update(batch, 0, left=1.0)["grad_norm"] > 0.01, "the norm before clipping is what is logged"
    after = torch.cat([p.detach().flatten() for p in parameters])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_only_the_policy_learns(algo, bases):
    """Catches a reflector or base that gets a gradient or moves: everything else is bit for bit what it was."""
    players = make_players(bases["gpt2"])
    learner, _, batch = corridor_batch(players, rl_args("--algo", algo, "--rl-lr", 0.1))
    mine = {id(p) for p in adapter_parameters(players.model, "policy")}
    before = {name: p.detach().clone() for name, p in players.model.named_parameters()}
    for step in range(2):
        learner.update(batch, step, left=1.0)
    for name, p in players.model.named_parameters():
        if id(p) in mine:
            assert not torch.equal(p, before[name]) or ".lora_" not in name, f"{name} did not move"
        else:
            assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad, f"{name} moved"
    assert len(lora_layers(players.model)) and mine


def test_truncated_episode_is_bootstrapped_terminated_is_not(bases):
    """Catches the horizon treated as the end of the task: PPO's targets of two one-step episodes, by hand."""
    players = make_players(bases["llama"], reflection=False)
    args = rl_args("--algo", "ppo", "--no-reflection", "--gamma", 0.9)
    learner = rl.Learner(players, args)
    torch.nn.init.normal_(learner.critic.layers[-1].weight)
    actions = ("a", "b")
    ends = [
        Episode(0, (Step("s", None, actions, 0, -0.7, 0.5, terminated, not terminated, False),), "after", actions)
        for terminated in (True, False)
    ]
    batch = rl.make_batch(learner, ends, args)
    after = learner.values([players.prompt("after", None, actions)]).item()
    assert abs(after) > 1e-3
    assert batch.returns.tolist() == pytest.approx([0.5, 0.5 + 0.9 * after], abs=1e-5)


class Arms:
    """A two-armed bandit: arm 1 pays."""

    def reset(self, *, seed=None, options=None):
        return "two arms", {"actions": ("left", "right"), "success": False}

    def step(self, action):
        return "over", float(action), True, False, {"actions": ("left", "right"), "success": action == 1}


@pytest.mark.parametrize("algo", ["reinforce", "ppo", "grpo", "rloo"])
def test_a_bandit_is_learned(algo, bases):
    """Catches a sign error anywhere between the reward and the weights: the paying arm's probability rises."""
    players = make_players(bases["llama"], reflection=False)
    learner = rl.Learner(
        players, rl_args("--algo", algo, "--rl-lr", 1e-2, "--episodes", 16, "--entropy", 0.0, "--clip", 10)
    )
    menu = ("left", "right")
    prompt, ids = players.prompt("two arms", None, menu), players.label_ids(menu)
    with torch.no_grad():  # start from even odds, whatever the random model says
        bad = players.log_probs([prompt], [ids])[0].argmax().item()
    arms = type("Arms", (Arms,), {"step": lambda self, action: Arms.step(self, int(action != bad))})
    for step in range(25):
        episodes = play(players, arms, [0] * 16, numbers=range(16 * step, 16 * step + 16))
        learner.update(rl.make_batch(learner, episodes, learner.args), step, left=1.0)
    with torch.no_grad():
        assert players.log_probs([prompt], [ids])[0, 1 - bad].exp().item() > 0.9


# ---------------------------------------------------------------------------------------------------------
# Whole runs, on Corridor

RUN = "corridor-rl-s0"


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_runs(one, other, ignore=("episodes_per_s", "cache_hits", "cut_reflections")):
    assert read_log(one, ignore) == read_log(other, ignore)
    a, b = adapter(one / "policy"), adapter(other / "policy")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(sft_runs, bases, tmp_path_factory):
    """The reference: a run of four updates in one go; its folder and what it printed."""
    runs = shutil.copytree(sft_runs, tmp_path_factory.mktemp("reference") / "runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(rl, *tiny_rl_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    return runs / RUN


@pytest.fixture(scope="module")
def resumed(sft_runs, bases, tmp_path_factory):
    """The same run, killed in its third update and gone on with."""
    runs = shutil.copytree(sft_runs, tmp_path_factory.mktemp("resumed") / "runs")
    real = rl.report

    def dying(run, progress, *rest):
        if progress["step"] == 3:
            raise Killed
        return real(run, progress, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        monkeypatch.setattr(rl, "report", dying)
        run_script(rl, *tiny_rl_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    assert reflect_rl.checkpoints(runs / RUN)[-1].name == "step-000002"
    random.seed(5)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_script(rl, *tiny_rl_options(bases["gpt2"], runs), "--resume", monkeypatch=monkeypatch)
    return runs / RUN


def test_log_has_a_line_per_update(finished):
    """Catches figures that are missing, constant or not finite, and a curve without its start or with two."""
    start, *lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert start["step"] == start["episodes"] == 0 and 0 <= start["valid_success"] <= 1
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["episodes"] for line in lines] == [6, 12, 18, 24]
    assert [line["stage"] for line in lines] == ["near", "near", "all", "all"]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert (
            0 <= line["success"] <= 1
            and 0 < line["entropy"] <= math.log(2) + 1e-6
            and 1 <= line["length"] <= Corridor.horizon
        )
        assert line["grad_norm"] > 0
    assert ["valid_success" in line for line in lines] == [False, True, False, True]


def test_the_first_step_is_on_policy(bases):
    """Catches rollout and update that disagree: before the first step the estimated KL is 0."""
    players = make_players(bases["gpt2"])
    learner, _, batch = corridor_batch(players, rl_args())
    assert abs(learner.approx_kl(batch, range(len(batch.prompts)))) < 1e-8


def test_the_reflector_is_the_sfts_to_the_end(finished):
    """Catches a reflector that moved during RL, and a policy that did not."""
    start = finished.parent / "corridor-sft-s0"
    for name, equal in (("reflect", True), ("policy", False)):
        before, after = adapter(start / name), adapter(finished / name)
        assert all(torch.equal(before[key], after[key]) for key in before) == equal, name


def test_same_seed_same_run(finished, runs, bases, monkeypatch):
    """Catches any draw that no seed controls, and any figure that depends on the process."""
    random.seed(123)
    torch.manual_seed(123)
    run_script(rl, *tiny_rl_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    assert_equal_runs(finished, runs / RUN, ignore=("episodes_per_s",))


def test_another_seed_is_another_run(finished, runs, bases, monkeypatch):
    """Catches a seed that is ignored: same SFT, other episodes."""
    shutil.copytree(runs / "corridor-sft-s0", runs / "corridor-sft-s1")
    config = runs / "corridor-sft-s1" / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    run_script(rl, *tiny_rl_options(bases["gpt2"], runs), "--seed", 1, monkeypatch=monkeypatch)
    assert read_log(runs / "corridor-rl-s1") != read_log(finished)


def test_resume_equals_uninterrupted(finished, resumed):
    """Catches a resume that forgets the optimizer, the place in the curriculum, the tasks or the episodes' RNGs."""
    assert_equal_runs(finished, resumed)


def test_resume_goes_on_with_the_counters(finished, resumed):
    """Catches counters that begin at 0 again: the log of a resumed run equals the uninterrupted one's, but for the
    clock."""
    assert read_log(finished) == read_log(resumed)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_resume_of_other_algorithms(algo, sft_runs, bases, tmp_path, monkeypatch):
    """Catches a critic, a critic's optimizer state or a replay buffer that a resume forgets."""
    options = ["--algo", algo, "--episodes", 8, *(["--replay", 2] if algo == "ppo" else [])]
    folders = [shutil.copytree(sft_runs, tmp_path / name) for name in ("whole", "cut")]
    run_script(rl, *tiny_rl_options(bases["gpt2"], folders[0]), *options, monkeypatch=monkeypatch)
    real = rl.make_batch
    count = itertools.count(1)

    def dying(*rest):
        if next(count) == 4:
            raise Killed
        return real(*rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rl, "make_batch", dying)
        run_script(rl, *tiny_rl_options(bases["gpt2"], folders[1]), *options, monkeypatch=patch)
    run_script(rl, *tiny_rl_options(bases["gpt2"], folders[1]), *options, "--resume", monkeypatch=monkeypatch)
    [one], [other] = ([path.parent for path in folder.glob(f"corridor-rl-{algo}*/config.json")] for folder in folders)
    assert_equal_runs(one, other)


def test_kill_9_during_a_save(finished, runs, bases, monkeypatch):
    """A real SIGKILL when half the state of the third checkpoint is written: the run loads, resumes and ends as if
    nothing had been."""
    options = [str(option) for option in tiny_rl_options(bases["gpt2"], runs)]
    code = f"""
import os, signal, sys, torch
import conftest, rl
real = torch.save
def killed(state, path):
    real(state, path)
    if state["step"] == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
sys.argv = ["rl.py"] + {options!r}
rl.main()
"""
    subprocess_of("-c", code, code=-9)
    assert reflect_rl.checkpoints(runs / RUN)[-1].name == "step-000002"
    assert reflect_rl.find_adapters(runs / RUN)["policy"].is_dir(), "what there is must be playable"
    run_script(rl, *options, "--resume", monkeypatch=monkeypatch)
    assert_equal_runs(finished, runs / RUN)


def test_stop_signal_saves_first(finished, runs, bases, monkeypatch):
    """Catches a Ctrl-C that loses everything since the last checkpoint: it ends the update, saves, and resumes
    equally."""
    real = rl.make_batch

    def signalled(learner, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(learner, *rest)

    options = [*tiny_rl_options(bases["gpt2"], runs), "--save-every", 100]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(rl, "make_batch", signalled)
        run_script(rl, *options, monkeypatch=patch)
    assert [path.name for path in reflect_rl.checkpoints(runs / RUN)] == ["step-000001"]
    run_script(rl, *options, "--resume", monkeypatch=monkeypatch)
    assert_equal_runs(finished, runs / RUN)


def test_finished_run_is_not_overwritten(finished, bases, monkeypatch):
    """Catches a second start that wipes a run, and other settings under its name."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume"):
        run_script(rl, *tiny_rl_options(bases["gpt2"], finished.parent), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="gamma"):
        run_script(
            rl, *tiny_rl_options(bases["gpt2"], finished.parent), "--resume", "--gamma", 0.5, monkeypatch=monkeypatch
        )
    run_script(rl, *tiny_rl_options(bases["gpt2"], finished.parent), "--resume", monkeypatch=monkeypatch)
    assert {path: path.read_bytes() for path in before} == before


def test_kill_while_a_finished_run_is_resumed(finished, bases, tmp_path, monkeypatch):
    """Catches final adapters that are rewritten in place, so that a kill destroys what was complete."""
    runs = shutil.copytree(finished.parent, tmp_path / "runs")

    def dying(model, name, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rl, "save_adapter", dying)
        try:
            run_script(rl, *tiny_rl_options(bases["gpt2"], runs), "--resume", monkeypatch=patch)
        except Killed:
            model, _ = reflect_rl.load_base(bases["gpt2"])
            for name, folder in reflect_rl.find_adapters(runs / RUN).items():
                reflect_rl.load_adapter(model, name, folder)


@pytest.mark.parametrize(
    "flag, name, stages",
    [
        ("--no-reflection", "corridor-rl-no-reflection-s0", ["near", "near", "all", "all"]),
        ("--no-negatives", "corridor-rl-no-negatives-s0", ["near", "near", "all", "all"]),
        ("--no-curriculum", "corridor-rl-no-curriculum-s0", ["all"] * 4),
    ],
)
def test_ablations(flag, name, stages, runs, bases, capsys, monkeypatch):
    """Catches a flag that does nothing, or whose run takes another's name."""
    run_script(rl, *tiny_rl_options(bases["gpt2"], runs), flag, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert name in table_of(out), "the ablation's row is not in the table"
    assert [line["stage"] for line in read_log(runs / name)] == stages
    assert (runs / name / "reflect").exists() == (flag != "--no-reflection")
    assert (runs / "corridor-sft-no-negatives-s0").exists() == (flag == "--no-negatives")


def test_no_reflection_plays_without(bases):
    """Catches an ablation that still reads reflections."""
    players = make_players(bases["gpt2"], reflection=False)
    [episode] = play(players, Corridor, [[0, 4]])
    assert all(step.reflection is None for step in episode.steps) and not players.counts["misses"]


def test_evaluation_repeats_the_runs_own_table(finished, runs, bases, capsys, monkeypatch):
    """Catches a panel that is not fixed: `eval.py` later prints the very line that `rl.py` ended with."""
    run_script(rl, *tiny_rl_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    first = table_of(capsys.readouterr().out)[RUN]
    run_script(
        evaluation,
        "--env",
        "corridor:Corridor",
        "--runs",
        runs,
        "--run",
        runs / RUN,
        "--repeats",
        1,
        "--bf16",
        "off",
        "--device",
        "cpu",
        monkeypatch=monkeypatch,
    )
    assert table_of(capsys.readouterr().out) == {RUN: first}


def test_episode_viewer(finished, bases, capsys, monkeypatch):
    """`reflect_rl.py`: catches a viewer that leaves out the reflection or the probabilities of the other actions."""
    run_script(
        reflect_rl,
        "--env",
        "corridor:Corridor",
        "--base",
        bases["gpt2"],
        "--run",
        finished,
        "--bf16",
        "off",
        monkeypatch=monkeypatch,
    )
    out = capsys.readouterr().out
    shares = [float(line.split("%")[0].split()[-1]) for line in out.splitlines() if "%" in line]
    assert len(shares) >= 2 and all(abs(a + b - 100) < 0.2 for a, b in zip(shares[::2], shares[1::2], strict=True))
    assert "# Analyze:" in out and "reward" in out and ("success after" in out or "failure after" in out)


def test_end_to_end_on_taxi(bases, tmp_path, capsys, monkeypatch):
    """The whole pipeline, tiny, on the shipped base where there is one: data, SFT, RL, evaluation, and a table at
    the end."""
    nano = ROOT / "models" / "nano"
    base = nano if (nano / "config.json").exists() else bases["gpt2"]
    run_script(
        rl,
        "--base",
        base,
        "--runs",
        tmp_path,
        "--device",
        "cpu",
        "--bf16",
        "off",
        "--trajectories",
        6,
        "--reflect-steps",
        2,
        "--policy-steps",
        2,
        "--batch",
        4,
        "--max-reflection",
        12,
        "--updates",
        3,
        "--episodes",
        4,
        "--eval-every",
        0,
        "--repeats",
        1,
        "--split",
        "valid",
        monkeypatch=monkeypatch,
    )
    rows = table_of(capsys.readouterr().out)
    sft_rows = ["taxi-sft-s0 without reflection", "taxi-sft-s0 with reflection"]
    assert list(rows) == ["random", "expert", *sft_rows, "taxi-rl-s0"]
    assert rows["expert"][0] == "100.0%" and rows["expert"][2] == "30" and float(rows["random"][0].rstrip("%")) < 20
    assert [line["stage"] for line in read_log(tmp_path / "taxi-rl-s0")] == [
        stage.name for stage in curriculum.stages_of(curriculum.envs.make("taxi"))
    ]
