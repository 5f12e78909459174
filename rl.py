"""The online stage: the reflector is frozen, the policy learns by policy gradient from its own play.

    for every update:   play a batch of episodes       r_t and log pi(a_t | s_t, reflection_t, A(s_t))
                        give each step its advantage   A_t: did the rest of the episode go better than expected?
                        gradient steps on              -E[A_t log pi(a_t)] - beta E[entropy]
                        log, evaluate, save

    --algo       advantage A_t                                              objective        gradient steps
    reinforce    return-to-go minus the other episodes' mean at time t      A log pi         1
    rloo         return minus the mean of the task's other episodes         A log pi         1
    grpo         return, standardised among the task's episodes             clipped ratio    2
    ppo          GAE, with a critic on the policy's own features            clipped ratio    up to 6
    paper        return-to-go, undiscounted; as many old successes replayed A log pi         1

The horizon is no end of the task: with a critic a truncated episode goes on with the critic's value, without one it
counts as ended, which a generous horizon makes harmless. Deviation: the paper plays 1-2 episodes an update, we play 32,
since equal prompts of a batch share a forward pass and the frozen reflector's texts are remembered.

    python rl.py                           # the whole pipeline on DangerousTaxi: data, SFT, RL, evaluation
    python rl.py --env alfworld --algo ppo
    python rl.py --no-reflection           # an ablation; also --no-negatives, --no-curriculum
    torchrun --nproc-per-node 2 rl.py      # every process plays and differentiates its share
"""

import argparse
import collections
import dataclasses
import math
import os
import random
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import curriculum
import envs
import eval as evaluation
import sft
from envs import UserError
from plumbing.options import COMMON, add_options, env_factory, parse_args
from plumbing.processes import gather, joined_processes, rank, sum_gradients, total, world
from plumbing.runs import Run, budget_of, check_settings, run_name, write_budget
from plumbing.show import report
from reflect_rl import (
    Episode, Step, adapter_parameters, add_adapter, load_adapter, load_players, play, save_adapter, use_adapter,
)

checks = envs.beside("../models/checks.py")
ALGORITHMS = {  # group: episodes of one task in a batch; epochs x minibatches: gradient steps on it
    "reinforce": {"group": 1, "epochs": 1, "minibatches": 1},
    "rloo": {"group": 4, "epochs": 1, "minibatches": 1},
    "grpo": {"group": 4, "epochs": 2, "minibatches": 1},
    "ppo": {"group": 1, "epochs": 3, "minibatches": 2},
    "paper": {"group": 1, "epochs": 1, "minibatches": 1},
}
OPTIONS = {
    "algo": ("reinforce", "see the table at the top of rl.py", tuple(ALGORITHMS)),
    "updates": (100, "batches of episodes", 1),
    "episodes": (32, "episodes in a batch", 1),
    "rl_lr": (1e-3, "peak learning rate; rises over the first tenth, then falls linearly to a fifth", 0.0),
    "entropy": (0.03, "weight of the entropy bonus; falls linearly to 0", 0.0),
    "kl": (0.0, "weight of the exact KL divergence from the SFT policy", 0.0),
    "replay": (0, "earlier successes learned from again in each batch, weighted; reinforce, ppo, paper", 0),
    "reflection": (True, "ablation: no reflector"),
    "sft": (True, "ablation: RL from the untuned policy; the reflector is trained"),
    "curriculum": (True, "ablation: the task itself from the first update"),
    "milestone": (True, "ablation: no reward for a sub-goal in the curriculum's stages"),
    "eval_every": (10, "updates between evaluations on the valid split, 0 = after the last one only", 0),
    "name": ("", "name of the run, made of environment, algorithm, ablations and seed if none is given"),
    "resume": (False, "go on from the run's checkpoint"),
}
GAMMA, GAE_LAMBDA = 0.97, 0.95  # discount; lambda of GAE
CLIP_NORM = 0.3  # largest norm of a gradient, the paper's
CLIP_RATIO = 0.2  # epsilon of the clipped ratio
TARGET_KL = 0.045  # nats; ppo leaves a batch when an epoch has moved the policy this far
CRITIC_LR = 3e-3
REPLAY_BUFFER = 256  # successes kept to be replayed

# ---------------------------------------------------------------------------------------------------------
# Returns and advantages: plain lists, an episode at a time


def returns_to_go(rewards, gamma):
    """G_t = r_t + gamma G_{t+1}, and 0 after the last step."""
    returns, G = [], 0.0
    for reward in reversed(rewards):
        G = reward + gamma * G
        returns.append(G)
    return returns[::-1]


def gae(rewards, values, after, gamma, lam):
    """Generalised advantage estimates A_t = sum_k (gamma lam)^k delta_{t+k} (Schulman et al. 2016, equation 16).

    `values[t]` is V(s_t), `after` the value after the last step: 0 if the task ended there, V if only time did.
    """
    deltas = []
    for reward, value, following in zip(rewards, values, [*values[1:], after], strict=True):
        deltas.append(reward + gamma * following - value)
    return returns_to_go(deltas, gamma * lam)


def time_baseline(returns):
    """Advantages of REINFORCE: each return-to-go minus the mean of the other episodes at the same time step.

    The own return is left out of its baseline: with it the gradient would shrink by (n - 1) / n. An episode that is
    alone at a time step is compared with the others at all times.
    """
    sums, counts = collections.Counter(), collections.Counter()  # of the returns at each time step
    for row in returns:
        for t, G in enumerate(row):
            sums[t] += G
            counts[t] += 1
    advantages = []
    for row in returns:
        others = counts.total() - len(row)  # steps of the other episodes
        elsewhere = (sums.total() - sum(row)) / others if others else 0.0
        advantages.append([])
        for t, G in enumerate(row):
            baseline = (sums[t] - G) / (counts[t] - 1) if counts[t] > 1 else elsewhere
            advantages[-1].append(G - baseline)
    return advantages


def group_advantages(returns, algo):
    """One advantage an episode, from the returns of one task's episodes.

    RLOO: minus the mean of the others. GRPO: minus the mean, over the standard deviation.
    """
    values = torch.tensor(returns, dtype=torch.float64)
    centered = values - values.mean()
    if algo == "rloo":
        return (centered * len(returns) / (len(returns) - 1)).tolist()
    return (centered / (values.std() + 1e-4)).tolist()


def give_advantages(episodes, args, players, critic):
    """Set `step.advantage` of all steps, and for PPO `step.target`, what the critic should have said.

    Returns figures to log.
    """
    rewards, figures = [], {}
    for episode in episodes:
        rewards.append([step.reward for step in episode.steps])
    if args.algo == "ppo":
        advantages, figures = critic_advantages(episodes, rewards, players, critic)
    elif args.algo == "reinforce":
        advantages = time_baseline([returns_to_go(row, GAMMA) for row in rewards])
    elif args.algo == "paper":
        advantages = [returns_to_go(row, 1.0) for row in rewards]
    else:
        returns, advantages = [returns_to_go(row, GAMMA)[0] for row in rewards], []
        for start in range(0, len(returns), args.group):  # the episodes of a task stand side by side
            compared = group_advantages(returns[start : start + args.group], args.algo)
            for A, row in zip(compared, rewards[start : start + args.group], strict=True):
                advantages.append([A] * len(row))  # the same at every step

    flat = torch.tensor(sum(advantages, []))
    if args.algo == "ppo":
        flat = flat - flat.mean()
    # One scale for all stages. REINFORCE's and RLOO's have been centred by their baselines.
    if args.algo not in ("grpo", "paper"):  # GRPO's are standardised already, the paper's never
        flat = flat / (flat.std(correction=0) + 1e-6)
    for step, advantage in zip(steps_of(episodes), flat.tolist(), strict=True):
        step.advantage = advantage * step.weight
    return figures


def steps_of(episodes):
    return [step for episode in episodes for step in episode.steps]


def critic_advantages(episodes, rewards, players, critic):
    """GAE of each episode, a list a row; sets the critic's targets."""
    values = iter(values_of(steps_of(episodes), players, critic))
    cut = [episode for episode in episodes if episode.truncated and not episode.terminated]
    # The decisions that would have come next, where only the horizon ended the episode.
    last = players.steps([episode.state for episode in cut], [episode.actions for episode in cut])
    after = dict(zip(map(id, cut), values_of(last, players, critic), strict=True))
    advantages, flat, targets = [], [], []
    for episode, row in zip(episodes, rewards, strict=True):
        own = [next(values) for _ in row]
        # Where the task itself ended, nothing follows: the value is 0.
        advantages.append(gae(row, own, after.get(id(episode), 0.0), GAMMA, GAE_LAMBDA))
        for step, advantage, value in zip(episode.steps, advantages[-1], own, strict=True):
            step.target = advantage + value
            flat.append(advantage)
            targets.append(step.target)
    explained = 1 - torch.tensor(flat).var(correction=0) / (torch.tensor(targets).var(correction=0) + 1e-8)
    return advantages, {"explained_variance": explained.item()}


class Critic(nn.Module):
    """State values from the policy's own features at the end of the prompt: no second language model."""

    def __init__(self, width, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.layers[-1].weight)  # at first every state is worth 0
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, features):  # (N, d) -> (N,); detached: the critic's loss never moves the policy
        return self.layers(features.detach().float())[:, 0]


@torch.no_grad()
def values_of(steps, players, critic):
    """V of each step's prompt, in micro-batches."""
    values = []
    for start in range(0, len(steps), players.micro_batch):
        _, features = players.forward(steps[start : start + players.micro_batch], hidden=True)
        values += critic(features).tolist()
    return values


# ---------------------------------------------------------------------------------------------------------
# Losses of N steps: pure functions of (N,) tensors, log_probs and reference are (N, A). Only their gradients mean
# anything.


def policy_gradient_loss(log_prob, advantage):
    """REINFORCE (Williams 1992): minus the mean of A log pi."""
    return -(log_prob * advantage).mean()


def clipped_loss(log_prob, old_log_prob, advantage, clip=CLIP_RATIO):
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7); at ratio 1 its gradient is REINFORCE's."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def entropy(log_probs):
    """Entropy in nats of each row; invalid actions are -inf and count nothing. (N,)"""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def kl_divergence(log_probs, reference):
    """KL(pi || reference) in nats of each row, exact over the valid actions (-inf in both). (N,)"""
    gap = (log_probs - reference).masked_fill(log_probs == -torch.inf, 0.0)
    return (log_probs.exp() * gap).sum(-1)


def loss_of(steps, players, critic, args, beta, sums):
    """The loss of some steps, a scalar: policy, entropy bonus, critic, KL. Adds to `sums` what is logged."""

    def column(name):
        return torch.tensor([getattr(step, name) for step in steps], device=players.device)

    if args.kl:  # before the policy's own pass, whose adapter must be the active one in its backward pass
        with torch.no_grad():
            reference = players.log_probs(players.forward(steps, adapter="sft"), steps)
    logits, features = players.forward(steps, hidden=True)  # (N, V), (N, d)
    log_probs = players.log_probs(logits, steps)  # (N, A)
    log_prob = log_probs.gather(1, column("action")[:, None])[:, 0]  # (N,)
    old_log_prob, advantage = column("log_prob"), column("advantage")

    if args.epochs * args.minibatches > 1:
        loss = clipped_loss(log_prob, old_log_prob, advantage)
        log_ratio = (log_prob - old_log_prob).detach()
        sums["approx_kl"] += (log_ratio.exp() - 1 - log_ratio).sum().item()  # Schulman 2020, in nats
        sums["clip_fraction"] += ((log_ratio.exp() - 1).abs() > CLIP_RATIO).sum().item()
    else:
        loss = policy_gradient_loss(log_prob, advantage)
    loss = loss - beta * entropy(log_probs).mean()
    if critic:
        loss = loss + 0.5 * (critic(features) - column("target")).pow(2).mean()
    if args.kl:
        distance = kl_divergence(log_probs, reference)
        loss = loss + args.kl * distance.mean()
        sums["kl_sft"] += distance.sum().item()
    sums["steps"] += len(steps)
    sums["entropy"] += entropy(log_probs).sum().item()
    return loss


def update(steps, players, critic, optimizer, args, number):
    """The gradient steps on a batch; the figures to log. Each process differentiates its share of the steps."""
    left = 1 - number / args.updates  # the share of the run still to come
    warm_up = min(1.0, (number + 1) / max(1, args.updates // 10))
    for group, peak in zip(optimizer.param_groups, (args.rl_lr, CRITIC_LR), strict=False):
        group["lr"] = peak * warm_up * (0.2 + 0.8 * left)

    policy_norms = []  # of the policy's gradient, before clipping
    for epoch in range(args.epochs):
        shuffled = random.Random(f"{args.seed}/{number}/{epoch}").sample(steps, len(steps))
        size, sums = -(-len(steps) // args.minibatches), collections.Counter()
        for start in range(0, len(steps), size):
            batch = shuffled[start : start + size]
            # Equal prompts stand together and share a row of the forward pass.
            mine = sorted(batch[rank() :: world()], key=lambda step: (len(step.ids), step.prompt))
            for i in range(0, len(mine), args.micro_batch):
                part = mine[i : i + args.micro_batch]
                # The entropy bonus falls to 0: exploration first, and in the end nothing but the return.
                loss = loss_of(part, players, critic, args, args.entropy * left, sums)
                # Summed over micro-batches and processes this is the gradient of the whole batch.
                (loss * len(part) / len(batch)).backward()
            norms = []
            for group in optimizer.param_groups:  # the policy's and the critic's are clipped apart
                sum_gradients(group["params"])
                norms.append(nn.utils.clip_grad_norm_(group["params"], CLIP_NORM).item())
            policy_norms.append(norms[0])
            if not all(map(math.isfinite, norms)):
                raise UserError(f"update {number + 1}: the gradient is not finite; try a smaller --rl-lr")
            optimizer.step()
            optimizer.zero_grad()
        sums = total(sums)  # of all processes
        count = sums.pop("steps")
        figures = {key: value / count for key, value in sums.items()}
        if figures.get("approx_kl", 0.0) > TARGET_KL:
            break
    return figures | {"grad_norm": statistics.fmean(policy_norms)}


# ---------------------------------------------------------------------------------------------------------
# Replay: earlier successes


def replayed(buffer, players, args, number):
    """Some earlier successes, to be learned from again; their steps are weighted by min(1, pi / mu).

    mu played them, pi is the policy now: without the weight the gradient would be another policy's.
    """
    episodes = []
    for fields in random.Random(f"{args.seed}/replay/{number}").sample(list(buffer), min(args.replay, len(buffer))):
        steps = [Step(**step) for step in fields["steps"]]
        before = [step.log_prob for step in steps]
        players.score(steps)
        for step, log_prob in zip(steps, before, strict=True):
            if args.algo != "paper":  # the authors' code has no weight
                step.weight = min(1.0, math.exp(step.log_prob - log_prob))
        episodes.append(Episode(**{**fields, "steps": steps}))
    return episodes


# ---------------------------------------------------------------------------------------------------------
# The run


def train(args, sft_adapters):
    """Play, give advantages, update, log, evaluate, save: `args.updates` times. Returns the run's folder."""
    run = Run(Path(args.runs) / run_name(args), args, args.resume)
    if world() > 1:
        dist.barrier()  # the first process has made or refused the run
    make_env, players = env_factory(args), load_players(args, sft_adapters)
    if not args.sft:
        torch.manual_seed(args.seed)
        add_adapter(players.model, "policy", args.rank, args.alpha, args.targets.split(",") if args.targets else None)
    critic, parameters, optimizer = make_learner(args, players, sft_adapters)
    done, saved = run.restore(parameters, optimizer)
    players.reflections.update(saved.get("reflections", {}))
    buffer = collections.deque(saved.get("buffer", []), maxlen=REPLAY_BUFFER)  # successes, as dicts

    given, authors = dict(args.env_option), args.algo == "paper"
    stages = curriculum.stages_of(make_env(), args.curriculum, args.milestone, given, authors)
    plan = curriculum.schedule(stages, args.updates)
    tasks = make_env().tasks("train")
    bar = tqdm(total=args.updates, initial=done, desc="rl", unit="update", disable=True if rank() else None)
    if args.eval_every and not done and rank() == 0:
        report(run, {"step": 0, "episodes": 0} | validate(players, make_env, args), [], bar)
    for number in range(done, args.updates):
        began, stage = time.perf_counter(), plan[number]
        if number and stage is not plan[number - 1]:  # a new stage
            buffer.clear()  # successes under other rewards and from other starts would mislead
        rng = random.Random(f"{args.seed}/tasks/{number}")
        chosen = rng.choices(stage.select(tasks), k=args.episodes // args.group)
        chosen = [task for task in chosen for _ in range(args.group)]  # each for a group of episodes
        episodes = play_together(players, make_env, chosen, stage.options, args, number)
        batch = episodes + replayed(buffer, players, args, number)
        figures = {"step": number + 1, "episodes": (number + 1) * args.episodes, "stage": stage.name}
        figures |= evaluation.summary(episodes)
        if number == done and rank() == 0:
            say_need(steps_of(batch), players, parameters)
        figures |= give_advantages(batch, args, players, critic)
        figures |= update(steps_of(batch), players, critic, optimizer, args, number)
        buffer.extend(dataclasses.asdict(episode) for episode in episodes if args.replay and episode.success)
        counts = total(players.counts)  # of reflections
        known = counts["hits"] / max(1, counts["hits"] + counts["misses"])
        figures |= {"cut_reflections": counts["cuts"], "cache_hits": known}
        figures["episodes_per_s"] = len(episodes) / (time.perf_counter() - began)
        if rank() == 0:
            if number + 1 == args.updates or (args.eval_every and (number + 1) % args.eval_every == 0):
                figures |= validate(players, make_env, args)
            report(run, figures, episodes, bar)
            run.save(number + 1, parameters, optimizer, reflections=players.reflections, buffer=list(buffer))
    if rank() == 0:
        save_players(run, players, sft_adapters, args)
    return run.folder


def save_players(run, players, sft_adapters, args):
    """Adapters of both players, the trained policy's with SFT's and its own updates in its budget."""
    for name in {**sft_adapters, "policy": None}:
        save_adapter(players.model, name, run.folder / name)
        budget = budget_of([sft_adapters[name]] if name in sft_adapters else [])
        if budget and name == "policy":
            budget["updates"] += args.updates * args.epochs * args.minibatches  # at most
            budget["episodes"] = args.updates * args.episodes
        if budget:
            write_budget(run.folder / name, **budget)


def make_learner(args, players, sft_adapters):
    """What is trained, the policy's adapter and for PPO a critic: `(critic, parameters, optimizer)`."""
    if args.kl:
        load_adapter(players.model, "sft", sft_adapters["policy"])
    players.model.requires_grad_(False)  # the reflector is frozen like the base
    policy = adapter_parameters(players.model, "policy")
    for parameter in policy:
        parameter.requires_grad_(True)
    groups, critic = [{"params": policy}], None
    if args.algo == "ppo":
        torch.manual_seed(args.seed)
        critic = Critic(players.model.get_output_embeddings().weight.shape[1]).to(players.device)
        groups.append({"params": list(critic.parameters())})
    optimizer = torch.optim.AdamW(groups, lr=args.rl_lr, weight_decay=0.0, fused=True)  # `update` sets the rates
    return critic, sum((group["params"] for group in groups), []), optimizer


def say_need(steps, players, parameters):
    """Print the memory that an update needs: before the first one, when the length of a prompt is known."""
    longest = max(steps, key=lambda step: len(step.ids))
    pair, texts = (longest.ids, longest.label_ids[:1]), min(players.micro_batch, len(steps))
    use_adapter(players.model, "policy")
    checks.say_memory("rl", players.device, parameters, texts, len(longest.ids),
                      lambda n: sft.loss_of([pair] * n, players, backward=True))


def play_together(players, make_env, tasks, options, args, number):
    """The episodes of all tasks, in their order; each process plays its share."""
    players.counts.clear()
    mine, first = range(rank(), len(tasks), world()), number * args.episodes
    numbers = [first + i for i in mine]
    played = play(players, make_env, [tasks[i] for i in mine], options, args.seed, numbers)
    if world() == 1:
        return played
    shares, episodes = gather(played), []
    for i in range(len(tasks)):
        episodes.append(shares[i % world()][i // world()])
        for step in episodes[-1].steps if players.reflection else ():
            players.reflections[step.state] = step.reflection  # what one process has written all know
    return episodes


def validate(players, make_env, args):
    """Success on the validation panel, sampled."""
    episodes = evaluation.evaluate(players, make_env, "valid", args.repeats)
    return {"valid_success": evaluation.summary(episodes)["success"], "valid_episodes": len(episodes)}


def resolve(args):
    """Fill in what the algorithm decides, and refuse what makes no sense."""
    vars(args).update(ALGORITHMS[args.algo])
    if args.algo == "paper":
        args.replay = args.replay or args.episodes
    # A wrong --name, a run that exists or one with other settings is refused now, and not after SFT.
    check_settings(Path(args.runs) / run_name(args), args, args.resume)
    if args.episodes % args.group:
        raise UserError(f"--episodes {args.episodes} cannot be divided into {args.algo}'s groups of {args.group}")
    if args.algo == "reinforce" and args.episodes < 2:
        raise UserError("reinforce compares episodes: --episodes must be at least 2")
    if args.kl and not args.sft:
        raise UserError("--kl is the distance from the policy of SFT: there is none with --no-sft")
    if args.replay and args.group > 1:
        raise UserError(f"{args.algo} compares episodes of one task; --replay goes with reinforce and ppo")


def pipeline(args, splits):
    """SFT where it is not done yet, RL, evaluation: for each split the rows of both, the RL run's last.

    An empty list on other processes than the first.
    """
    resolve(args)
    stages, first = ["reflect"] * args.reflection, os.environ.get("RANK", "0") == "0"
    if args.sft:
        stages.append("policy" if args.reflection else "plain")
    if not stages and first:  # else SFT does
        checks.check_own(env_factory(args)(), args)
    if stages and first:  # under torchrun the others wait in joined_processes
        sft.run(args, stages)
    with joined_processes(args):  # after SFT, which is the first process's work alone
        folder, tables = train(args, sft.adapters(args)), []
        for split in splits if rank() == 0 else []:
            args.split = split
            rows = evaluation.run_rows(sft.folder_of(args), args) if stages else []
            tables.append(rows + evaluation.run_rows(folder, args))
    return tables


def main():
    parser = argparse.ArgumentParser(description="The whole pipeline: data, SFT, RL, evaluation.")
    panel = {"repeats": evaluation.OPTIONS["repeats"]}
    add_options(parser, COMMON, sft.DATA_OPTIONS, sft.OPTIONS, OPTIONS, panel)
    args = parse_args(parser)
    splits = env_factory(args)().panels
    for split, rows in zip(splits, pipeline(args, splits), strict=False):
        args.split = split
        evaluation.print_table(evaluation.baseline_rows(args) + rows)


if __name__ == "__main__":
    envs.run_main(main)
