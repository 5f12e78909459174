"""The formulas and the update of the online stage, each against an independent computation."""

import dataclasses
import math
import random
import statistics

import pytest
import torch
from online_helpers import Walk, make_players, make_start, rl_args
from torch.distributions import Categorical, kl_divergence

import rl
from reflect_rl import play, use_adapter
from rl import Learner

ALGORITHMS = ("reinforce", "rloo", "grpo", "ppo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start"))[0]


@pytest.fixture(scope="module")
def walks(base):
    """Episodes of random-ish play, twelve of each of three tasks: successes, failures and truncated ones."""
    return play_walks(make_players(base))


def play_walks(players):
    tasks = [task for task in Walk().tasks("train")[:3] for _ in range(12)]
    return play(players, Walk, tasks, seed=3, batch=5)


def make_learner(base, *options):
    players = make_players(base)
    return Learner(players, rl_args(*options)), players


def ends(episodes):
    return {"success" if e.success else "truncated" if e.steps[-1].truncated else "failure" for e in episodes}


def test_walks_end_in_every_way(walks):
    """Without this, tests of truncation or of replay could pass on nothing."""
    assert ends(walks) == {"success", "failure", "truncated"}
    assert len({len(step.actions) for episode in walks for step in episode.steps}) == 2, "no masked action anywhere"


# ---------------------------------------------------------------------------------------------------------
# Returns and advantages


@pytest.mark.parametrize("bootstrap", [0.0, 0.7], ids=["terminated", "truncated"])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_is_the_weighted_mean_of_n_step_advantages(bootstrap, lam):
    """Equation 16's other form, by a double loop. Bug: the value after the last step left out, or taken for 0."""
    rng, gamma, T = random.Random(0), 0.9, 6
    rewards = [rng.gauss(0, 1) for _ in range(T)]
    values = [*(rng.gauss(0, 1) for _ in range(T)), bootstrap]
    for t in range(T):
        expected, weight_left = 0.0, 1.0
        for n in range(1, T - t + 1):  # the n-step advantage: n rewards, then the value where they end
            seen = sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * values[t + n] - values[t]
            weight = weight_left if n == T - t else (1 - lam) * lam ** (n - 1)
            expected, weight_left = expected + weight * seen, weight_left - weight
        assert rl.gae(rewards, values[:T], bootstrap, gamma, lam)[t] == pytest.approx(expected, abs=1e-9)


def test_returns_to_go_with_bootstrap():
    """Bug: the bootstrap discounted once too often or too rarely."""
    assert rl.returns_to_go([1.0, 2.0, 4.0], 0.5, bootstrap=8.0) == [1 + 1 + 1 + 1, 2 + 2 + 2, 4 + 4]


def test_time_baseline_is_the_mean_of_the_episodes_that_got_there():
    """Bug: short episodes counted as zeros, or one mean over all time steps."""
    assert rl.time_baseline([[3.0, 5.0], [1.0], [2.0, 1.0]]) == [[1.0, 2.0], [-1.0], [0.0, -2.0]]


def test_group_advantages_by_hand():
    """Bugs: the own return in RLOO's mean, groups mixed up, a division by 0 for a group of one or of equals."""
    returns, groups = [1.0, 5.0, 2.0, 7.0, 3.0, 3.0, 0.0], ["a", "b", "a", "c", "a", "d", "b"]
    a = {0: 1.0, 2: 2.0, 4: 3.0}
    rloo = rl.group_advantages(returns, groups, leave_one_out=True)
    assert [rloo[i] for i in a] == pytest.approx([1 - 2.5, 2 - 2, 3 - 1.5])
    assert (rloo[1], rloo[6]) == pytest.approx((5, -5)) and rloo[3] == rloo[5] == 0
    grpo = rl.group_advantages(returns, groups, leave_one_out=False)
    deviation = statistics.stdev(a.values())
    assert [grpo[i] for i in a] == pytest.approx([(v - 2) / deviation for v in a.values()], rel=1e-3)
    assert grpo[3] == grpo[5] == 0
    assert rl.group_advantages([2.0, 2.0], ["x", "x"], leave_one_out=False) == [0, 0]


def value_of(prompt):
    """A made-up critic: any function of the prompt will do."""
    return len(prompt) / 100


@pytest.fixture
def known_critic(base):
    """A PPO learner whose critic says `value_of`, and its raw (not yet standardised) advantages of episodes."""
    learner, _ = make_learner(base, "--algo", "ppo", "--gamma", 0.9, "--gae-lambda", 0.8)
    learner.values = lambda prompts: torch.tensor([value_of(p) for p in prompts], dtype=torch.float64)

    def advantages(episodes):
        prompts = [learner.players.prompt(s.state, s.reflection, s.actions) for e in episodes for s in e.steps]
        return rl.critic_advantages(learner, episodes, prompts, learner.args)

    return learner, advantages


def advantages_by_hand(players, episode, gamma=0.9, lam=0.8):
    """GAE of an episode by its definition: a sum over later temporal differences, for each step anew."""
    value = [value_of(players.prompt(s.state, s.reflection, s.actions)) for s in episode.steps]
    last = players.prompt(episode.final_state, players.reflect([episode.final_state])[0], episode.final_actions)
    value.append(0.0 if episode.steps[-1].terminated else value_of(last))
    delta = [s.reward + gamma * value[t + 1] - value[t] for t, s in enumerate(episode.steps)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


def test_truncated_episodes_go_on_with_the_value_of_the_final_state(known_critic, walks):
    """Bug: the horizon taken for an end of the task, or an end of the task for the horizon."""
    learner, advantages = known_critic
    by_hand = [a for episode in walks for a in advantages_by_hand(learner.players, episode)]
    found, targets, values = advantages(walks)
    assert found == pytest.approx(by_hand, abs=1e-9)
    torch.testing.assert_close(targets, torch.tensor(found, dtype=torch.float64) + values, atol=1e-6, rtol=0)


def test_an_end_at_the_horizon_is_an_end(known_critic, walks):
    """An environment may set both flags at once (Gymnasium's time limit does). Bug: it is bootstrapped."""
    learner, advantages = known_critic
    success = next(episode for episode in walks if episode.success)
    last = rl.dataclasses.replace(success.steps[-1], truncated=True)
    both = rl.dataclasses.replace(success, steps=(*success.steps[:-1], last))
    assert advantages([both])[0] == pytest.approx(advantages_by_hand(learner.players, success), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Losses


def random_batch(n=64, seed=0):
    torch.manual_seed(seed)
    mask = (torch.rand(n) > 0.3).double()
    return -torch.rand(n, dtype=torch.float64) * 3, torch.randn(n, dtype=torch.float64), mask


def test_ppo_at_ratio_one_is_reinforce():
    """Value: minus the mean advantage; gradient: REINFORCE's. Bug: a wrong sign, a wrong mean, clipping at the kink."""
    log_prob, advantage, mask = random_batch()
    ppo, reinforce = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    loss = rl.ppo_loss(ppo, log_prob, advantage, mask, clip=0.2)
    loss.backward()
    rl.policy_gradient_loss(reinforce, advantage, mask).backward()
    torch.testing.assert_close(ppo.grad, reinforce.grad)
    torch.testing.assert_close(reinforce.grad, -advantage * mask / mask.sum())
    assert loss.item() == pytest.approx(-advantage[mask > 0].mean().item())


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.19, 1.21, 2.0])
@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_clipping_kills_the_gradient_only_where_it_went_far_enough(ratio, advantage):
    """No gradient beyond the clip on the advantage's side; all of it elsewhere. Bug: maximum for minimum."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    rl.ppo_loss(log_prob, 0 * one, advantage * one, one, clip=0.2).backward()
    dead = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert log_prob.grad.item() == pytest.approx(0.0 if dead else -advantage * ratio)


def masked_rows():
    torch.manual_seed(0)
    counts = [1, 2, 4, 6]
    logits, other = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    invalid = torch.arange(6) >= torch.tensor(counts)[:, None]
    return counts, *(x.masked_fill(invalid, -torch.inf).log_softmax(-1) for x in (logits, other))


def test_entropy_and_kl_are_torchs_on_the_valid_actions():
    """Bugs: 0 * -inf = NaN, or invalid actions counted."""
    counts, log_probs, reference = masked_rows()
    for row, n in enumerate(counts):
        p, q = Categorical(logits=log_probs[row, :n]), Categorical(logits=reference[row, :n])
        torch.testing.assert_close(rl.entropy(log_probs)[row], p.entropy())
        torch.testing.assert_close(rl.kl_divergence(log_probs, reference)[row], kl_divergence(p, q))


def test_entropy_and_kl_have_finite_gradients():
    """Bug: the gradient of a masked action is NaN, and the guard skips every update."""
    _, log_probs, reference = masked_rows()
    for figure in (rl.entropy, lambda x: rl.kl_divergence(x, reference)):
        logits = log_probs.clone().requires_grad_()
        figure(logits.log_softmax(-1)).sum().backward()
        assert logits.grad.isfinite().all()


def test_critic_loss_is_clipped_around_the_old_value():
    """Clip 0.5, old value 0, target 2: 0.25 is within, 1 is beyond (no gradient), -1 went the wrong way."""
    value = torch.tensor([0.25, 1.0, -1.0], requires_grad=True)
    loss = rl.critic_loss(value, torch.zeros(3), torch.full((3,), 2.0), clip=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (1.75**2 + 1.5**2 + 3.0**2) / 3)
    assert value.grad.tolist() == pytest.approx([-1.75 / 3, 0.0, -3.0 / 3])


# ---------------------------------------------------------------------------------------------------------
# The update


def policy_weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.optimizer.param_groups[0]["params"]])


def test_the_critic_never_moves_the_policy(base, walks):
    """Bug: its loss reaches the LoRA weights through the features. Without advantage and bonus it is the only loss."""
    learner, _ = make_learner(base, "--algo", "ppo", "--entropy", 0)
    batch = rl.make_batch(learner, walks, learner.args)
    batch.advantage.zero_()
    policy, critic = policy_weights(learner), learner.critic.layers[-1].weight.detach().clone()
    learner.update(batch, step=0, left=1.0)
    assert torch.equal(policy_weights(learner), policy)
    assert not torch.equal(learner.critic.layers[-1].weight, critic)


@pytest.mark.parametrize("micro_batch", [1, 7])
def test_the_first_ratio_is_one(micro_batch, base, walks):
    """Rollout and update score a prompt with other batch mates and other padding. Bug: left padding that shows."""
    learner, players = make_learner(base, "--algo", "ppo")
    batch = rl.make_batch(learner, walks, learner.args)
    assert len(set(map(len, batch.prompts))) > 3, "all prompts are equally long: padding is not tested"
    for start in range(0, len(batch.prompts), micro_batch):
        part = slice(start, start + micro_batch)
        now = players.log_probs(batch.prompts[part], batch.menus[part]).gather(1, batch.action[part][:, None])[:, 0]
        assert ((now - batch.old_log_prob[part]).exp() - 1).abs().max() < 1e-5


def gradients_of(learner, batch, bonus=0.03):
    """What `minibatch` hands to the optimizer for the whole batch, by parameter group."""
    kept = []

    def keep():
        for group in learner.optimizer.param_groups:
            kept.append(torch.cat([p.grad.flatten() for p in group["params"]]))

    learner.optimizer.step = keep
    learner.minibatch(batch, list(range(len(batch.prompts))), bonus, rl.collections.Counter())
    return kept


def log_probs_by_hand(players, prompt, menu, adapter):
    """One prompt by itself, no padding, the whole vocabulary, the model's own forward: `(log-probs, features)`."""
    use_adapter(players.model, adapter)
    ids = torch.tensor([players.tokenizer(prompt)["input_ids"]])
    output = players.model(ids, output_hidden_states=True, use_cache=False)
    return output.logits[0, -1, list(menu)].log_softmax(-1), output.hidden_states[-1][0, -1]


def gradients_by_hand(learner, batch, bonus, kl_weight, clip_ratio=0.2):
    """The sum over steps of the definitions, then the clipped gradient norm of each group."""
    total, players = 0.0, learner.players
    for i, prompt in enumerate(batch.prompts):
        log_probs, features = log_probs_by_hand(players, prompt, batch.menus[i], "policy")
        p = log_probs.exp()
        ratio = (log_probs[batch.action[i]] - batch.old_log_prob[i]).exp()
        A = batch.advantage[i]
        if learner.args.algo in ("ppo", "grpo"):
            loss = -torch.min(ratio * A, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * A)
        else:
            loss = -A * log_probs[batch.action[i]]
        with torch.no_grad():
            reference, _ = log_probs_by_hand(players, prompt, batch.menus[i], "sft")
        loss = loss + bonus * (p * log_probs).sum() + kl_weight * (p * (log_probs - reference)).sum()
        if learner.critic:
            loss = loss + 0.5 * (learner.critic(features[None])[0] - batch.returns[i]) ** 2
        total = total + loss / len(batch.prompts)
    found = []
    for group in learner.optimizer.param_groups:
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, group["params"], retain_graph=True)])
        found.append(gradient * min(1.0, learner.args.clip / gradient.norm().item()))
    return found


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_micro_batches_give_the_gradient_of_the_large_batch(algo, base, walks):
    """Against one prompt at a time. Bugs: means of unequal parts averaged, a term scaled wrongly, a wrong row."""
    found = {}
    for micro_batch in (1, 3, 1000):
        options = ("--algo", algo, "--kl", 0.5, "--micro-batch", micro_batch, "--clip-value", 100)
        learner, players = make_learner(base, *options)
        rl.save_adapter(players.model, "reflect", base / "other")  # any other policy will do as the SFT policy
        rl.load_adapter(players.model, "sft", base / "other")
        batch = rl.make_batch(learner, walks, learner.args)
        batch.old_log_prob -= torch.linspace(-0.5, 0.5, len(batch.prompts))  # ratios on both sides of the clip
        if micro_batch == 1:
            by_hand = gradients_by_hand(learner, batch, 0.03, 0.5)
        found[micro_batch] = gradients_of(learner, batch)
    for gradients in found.values():
        assert len(gradients) == (2 if algo == "ppo" else 1)
        for one, other in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def played_by_another(episodes, shift):
    """The episodes as if their policy mu had had log-probabilities higher by `shift`, in turn up and down."""
    return [
        dataclasses.replace(
            episode,
            steps=tuple(
                dataclasses.replace(step, log_prob=step.log_prob + shift * (-1) ** i)
                for i, step in enumerate(episode.steps)
            ),
        )
        for episode in episodes
    ]


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_fresh_steps_have_weight_one_and_replayed_ones_at_most_one(algo, base, walks):
    """Replay: the advantage times pi/mu, cut at 1, of replayed steps only; their ratio begins at 1 like the others'.

    Bugs: rounding that reweights fresh steps, a ratio to mu that PPO does not cut where the advantage is negative.
    """
    old = [e for e in walks if e.success and len(e.steps) > 1][:2]
    fresh = [e for e in walks if not e.success]
    learner, players = make_learner(base, "--algo", algo, "--replay", 2)
    plain = rl.make_batch(learner, [*fresh, *old], learner.args)
    batch = rl.make_batch(learner, fresh, learner.args, replayed=played_by_another(old, 0.4))
    n = sum(len(e.steps) for e in fresh)
    weights = [1.0] * n + [min(1.0, math.exp(-0.4 * (-1) ** i)) for e in old for i in range(len(e.steps))]
    assert len(set(weights)) == 2 and len(weights) > n
    torch.testing.assert_close(batch.advantage, plain.advantage * torch.tensor(weights), atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.old_log_prob[:n], plain.old_log_prob[:n]), "the policy's own figures stay as they were"
    for i, prompt in enumerate(batch.prompts):
        log_prob = log_probs_by_hand(players, prompt, batch.menus[i], "policy")[0][batch.action[i]]
        assert batch.old_log_prob[i].item() == pytest.approx(log_prob.item(), abs=1e-4)


def count_steps(learner):
    """Learning rates of the policy at each optimizer step from now on, in a list that fills."""
    rates, step = [], learner.optimizer.step
    learner.optimizer.step = lambda: (rates.append(learner.optimizer.param_groups[0]["lr"]), step())
    return rates


def test_learning_rate_warms_up_and_decays(base, walks):
    """Ten updates by hand: up over four, down to a fifth. Bug: the rate of the step before, or a last rate of 0."""
    learner, _ = make_learner(base, "--rl-lr", 1.0, "--warmup", 4)
    batch, rates = rl.make_batch(learner, walks[:1], learner.args), []
    learner.optimizer.step = lambda: rates.append(learner.optimizer.param_groups[0]["lr"])
    for step in range(10):
        learner.update(batch, step, left=1 - step / 10)
    assert rates == pytest.approx([0.25, 0.46, 0.63, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28])


@pytest.mark.parametrize(("target", "passes"), [(0.0, 5), (1e-6, 1), (100.0, 5)])
def test_ppo_stops_where_the_policy_has_moved_enough(target, passes, base, walks):
    """Bug: the early stop never or always fires."""
    learner, _ = make_learner(base, "--algo", "ppo", "--epochs", 5, "--target-kl", target, "--rl-lr", 1e-2)
    batch, steps = rl.make_batch(learner, walks, learner.args), count_steps(learner)
    figures = learner.update(batch, step=0, left=1.0)
    assert figures["approx_kl"] > 1e-5 and len(steps) == 2 * passes


def test_approx_kl_by_hand(base, walks):
    """From the policy before the update to that after it, replayed steps too. Bug: always 0, or measured from mu."""
    old = [e for e in walks if e.success][:1]
    fresh = [e for e in walks if not e.success]
    learner, players = make_learner(base, "--rl-lr", 3e-2, "--replay", 1)
    batch = rl.make_batch(learner, fresh, learner.args, replayed=played_by_another(old, 3.0))
    assert len(batch.prompts) <= 128
    before = players.log_probs(batch.prompts, batch.menus).gather(1, batch.action[:, None])[:, 0].tolist()
    figures = learner.update(batch, step=0, left=1.0)
    now = players.log_probs(batch.prompts, batch.menus).gather(1, batch.action[:, None])[:, 0].tolist()
    log_ratios = [new - old for new, old in zip(now, before, strict=True)]
    by_hand = statistics.mean(math.exp(x) - 1 - x for x in log_ratios)
    assert by_hand > 1e-3 and figures["approx_kl"] == pytest.approx(by_hand, rel=1e-2)


def test_equal_returns_teach_nothing(base):
    """Bug: rounding of the mean, blown up by the standardisation to a full-size advantage."""
    for value, size in ((-31.7, 3), (13.3, 7), (0.7, 7)):
        for leave_one_out in (True, False):
            found = rl.group_advantages([value] * size, ["one"] * size, leave_one_out)
            assert found == pytest.approx([0.0] * size, abs=1e-10)


def test_explained_variance_by_hand(base, walks):
    """1 of a perfect critic, 0 of a constant one. Bug: the values after the update, or the wrong variance."""
    learner, _ = make_learner(base, "--algo", "ppo")
    batch = rl.make_batch(learner, walks, learner.args)
    assert learner.update(batch, 0, 1.0)["explained_variance"] == pytest.approx(0.0, abs=1e-5)  # a new critic says 0
    batch.old_value = batch.returns.clone()
    assert learner.update(batch, 1, 1.0)["explained_variance"] == pytest.approx(1.0)


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_single_step_is_a_batch(algo, base, walks):
    """Bug: the standard deviation of one number is NaN, and every update of a batch of one is skipped."""
    one = next(episode for episode in walks if len(episode.steps) == 1)
    learner, _ = make_learner(base, "--algo", algo)
    figures = learner.update(rl.make_batch(learner, [one], learner.args), 0, 1.0)
    assert learner.skipped == 0 and all(math.isfinite(value) for value in figures.values())


def test_players_and_learner_agree_on_what_is_trained(base):
    """Bug: the reflector, the SFT reference or the base gets a gradient."""
    learner, players = make_learner(base, "--algo", "ppo")
    trained = {name for name, p in players.model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(".policy") for name in trained)
    in_optimizer = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    expected = {id(p) for p in players.model.parameters() if p.requires_grad} | {
        id(p) for p in learner.critic.parameters()
    }
    assert in_optimizer == expected
