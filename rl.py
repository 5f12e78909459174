"""The online stage: the reflector is frozen, the policy learns by policy gradient.

    repeat: play a batch of episodes        r_t, log pi(a_t | s_t, reflection_t, A(s_t))
            advantages A_t                  how much better than a baseline the rest of the episode went (see below)
            gradient steps on               - E[ A_t log pi(a_t) ] - beta E[ H(pi) ]        (PPO: the clipped ratio)
            log, evaluate, save

    --algo       advantage A_t                                       loss            steps on a batch
    reinforce    return-to-go minus the batch's mean at time t       A log pi        1
    rloo         return minus that of the task's other episodes      A log pi        1
    grpo         return, standardised among the task's episodes      clipped ratio   several
    ppo          GAE with a critic on the policy's own features      clipped ratio   several

The horizon is no end of the task: with a critic a truncated episode goes on with the critic's value, without one it
counts as ended, which a generous horizon makes harmless. Deviation: the paper plays 1-2 episodes an update, we play
32, since equal prompts of a batch share a forward pass and the frozen reflector's texts are memoised.

    python rl.py                           # data, SFT, RL, evaluation on DangerousTaxi: the whole pipeline
    python rl.py --no-reflection           # an ablation; also --no-negatives, --no-curriculum
    torchrun --nproc-per-node 2 rl.py      # the same numbers, each process plays and differentiates its share
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import curriculum
import envs
import eval as evaluation
import sft
from envs import UserError
from reflect_rl import (
    Episode,
    Step,
    adapter_parameters,
    add_common_options,
    env_factory,
    find_adapters,
    from_first,
    join_processes,
    load_adapter,
    load_players,
    lock_run,
    log_line,
    open_run,
    parse_args,
    play,
    rank,
    save_adapter,
    save_checkpoint,
    short_name,
    show_step,
    sum_gradients,
    summed,
    world,
)

# ---------------------------------------------------------------------------------------------------------
# Returns and advantages: plain lists, one episode at a time


def returns_to_go(rewards, gamma, bootstrap=0.0):
    """G_t = r_t + gamma G_{t+1}, with `bootstrap` for the value of what follows the last step."""
    returns, G = [], bootstrap
    for reward in reversed(rewards):
        G = reward + gamma * G
        returns.append(G)
    return returns[::-1]


def gae(rewards, values, bootstrap, gamma, lam):
    """Generalised advantage estimates A_t = sum_k (gamma lam)^k delta_{t+k} (Schulman et al. 2016, equation 16).

    `values[t]` is V(s_t), `bootstrap` the value after the last step: 0 if the task ended there, V if only time did.
    """
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return returns_to_go(deltas, gamma * lam)


def time_baseline(returns):
    """Advantages of REINFORCE: each return-to-go minus the mean over the batch at the same time step."""
    longest = max(map(len, returns))
    mean = [sum(at_t) / len(at_t) for t in range(longest) if (at_t := [G[t] for G in returns if t < len(G)])]
    return [[G_t - mean[t] for t, G_t in enumerate(G)] for G in returns]


def group_advantages(returns, groups, leave_one_out):
    """One advantage an episode from the returns of its group, the episodes of the same task.

    `leave_one_out` (RLOO): minus the mean of the others. Else (GRPO): minus the mean, over the standard deviation.
    """
    members = collections.defaultdict(list)
    for episode, group in enumerate(groups):
        members[group].append(episode)
    advantages = [0.0] * len(returns)
    for group in members.values():
        values = torch.tensor([returns[i] for i in group], dtype=torch.float64)
        if len(group) > 1:
            centered = values - values.mean()
            found = centered * len(group) / (len(group) - 1) if leave_one_out else centered / (values.std() + 1e-4)
            for i, advantage in zip(group, found.tolist(), strict=True):
                advantages[i] = advantage
    return advantages


# ---------------------------------------------------------------------------------------------------------
# Losses: pure functions of (N,) tensors. Only their gradients mean anything.


def policy_gradient_loss(log_prob, advantage, mask):
    """REINFORCE (Williams 1992): minus the mean of A log pi over the steps that count."""
    return -(log_prob * advantage * mask).sum() / mask.sum()


def ppo_loss(log_prob, old_log_prob, advantage, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7); at ratio 1 its gradient is REINFORCE's."""
    ratio = (log_prob - old_log_prob).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(surrogate * mask).sum() / mask.sum()


def critic_loss(value, old_value, returns, clip):
    """Squared error of the critic, no step further than `clip` from its old value (PPO's value clipping)."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2).mean()


def entropy(log_probs):
    """Entropy in nats of each row of log-probabilities (N, A); invalid actions are -inf and count nothing. (N,)"""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def kl_divergence(log_probs, reference):
    """KL(pi || reference) in nats of each row, exact over the valid actions (-inf in both). (N,)"""
    gap = (log_probs - reference).masked_fill(log_probs == -torch.inf, 0.0)
    return (log_probs.exp() * gap).sum(-1)


class Critic(nn.Module):
    """State values from the policy's own features at the last real position: no second LM, full context."""

    def __init__(self, width, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, features):  # (N, d) -> (N,); detached: the critic's loss never moves the policy
        return self.layers(features.detach().float())[:, 0]


# ---------------------------------------------------------------------------------------------------------
# From episodes to a batch


@dataclasses.dataclass
class Batch:
    """The N steps of an update, flat; the tensors are (N,)."""

    prompts: list
    menus: list  # label token ids of the valid actions of each step
    action: torch.Tensor
    old_log_prob: torch.Tensor
    advantage: torch.Tensor
    returns: torch.Tensor | None = None  # the critic's targets
    old_value: torch.Tensor | None = None


def make_batch(learner, fresh, args, replayed=()):
    """Prompts, actions and advantages of the fresh episodes and of those that are replayed.

    These were played by earlier policies mu: their advantages are weighted by min(1, pi / mu), pi being the policy now.
    """
    episodes = [*fresh, *replayed]
    steps = [step for episode in episodes for step in episode.steps]
    prompts = [learner.players.prompt(step.state, step.reflection, step.actions) for step in steps]
    returns = values = None
    if learner.critic:
        advantage, returns, values = critic_advantages(learner, episodes, prompts, args)
    else:
        rewards = [[step.reward for step in episode.steps] for episode in episodes]
        togo = [returns_to_go(r, args.gamma) for r in rewards]
        if args.algo == "reinforce":
            advantage = [a for row in time_baseline(togo) for a in row]
        else:
            per_episode = group_advantages([G[0] for G in togo], [str(e.task) for e in episodes], args.algo == "rloo")
            advantage = [a for a, episode in zip(per_episode, episodes, strict=True) for _ in episode.steps]
    advantage = torch.tensor(advantage)
    if args.algo != "grpo":  # GRPO's are standardised by group
        advantage = (advantage - advantage.mean() * (args.algo == "ppo")) / (advantage.std(correction=0) + 1e-6)
    menus = [learner.players.label_ids(step.actions) for step in steps]
    action = torch.tensor([step.action for step in steps])
    old_log_prob = torch.tensor([step.log_prob for step in steps])
    if replayed:
        old = slice(sum(len(episode.steps) for episode in fresh), None)
        now = learner.log_prob(prompts[old], menus[old], action[old])
        advantage[old] *= (now - old_log_prob[old]).exp().clamp(max=1.0)
        old_log_prob[old] = now
    return Batch(prompts, menus, action, old_log_prob, advantage, returns, values)


def critic_advantages(learner, episodes, prompts, args):
    """GAE of all steps, flat, with the critic's targets and its values before the update."""
    out_of_time = [e.steps[-1].truncated and not e.steps[-1].terminated for e in episodes]
    cut = [episode for episode, cut_off in zip(episodes, out_of_time, strict=True) if cut_off]
    after = learner.values(learner.final_prompts(cut)).tolist() if cut else []
    values, bootstraps = learner.values(prompts), iter(after)
    advantage, start = [], 0
    for episode, cut_off in zip(episodes, out_of_time, strict=True):
        end = start + len(episode.steps)
        bootstrap = next(bootstraps) if cut_off else 0.0
        rewards = [step.reward for step in episode.steps]
        advantage += gae(rewards, values[start:end].tolist(), bootstrap, args.gamma, args.gae_lambda)
        start = end
    return advantage, torch.tensor(advantage) + values, values


# ---------------------------------------------------------------------------------------------------------
# The learner: policy, critic, optimizer, on one process or several


def gathered(share):
    """The lists of all ranks, interleaved: rank r holds items r, r + world, r + 2 world, ..."""
    if world() == 1:
        return share
    shares = [None] * world()
    dist.all_gather_object(shares, share)
    return [shares[i % world()][i // world()] for i in range(sum(map(len, shares)))]


class Learner:
    """What is trained: the policy's adapter and, for PPO, a critic. The reflector and the base are frozen."""

    def __init__(self, players, args):
        self.players, self.args = players, args
        for parameter in players.model.parameters():
            parameter.requires_grad_(False)
        policy = adapter_parameters(players.model, "policy")
        for parameter in policy:
            parameter.requires_grad_(True)
        groups = [{"params": policy, "lr": args.rl_lr}]
        self.critic = None
        if args.algo == "ppo":
            torch.manual_seed(args.seed)
            self.critic = Critic(players.model.get_output_embeddings().weight.shape[1]).to(players.device)
            groups.append({"params": list(self.critic.parameters()), "lr": args.critic_lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.peak = [group["lr"] for group in groups]
        self.buffer = collections.deque(maxlen=args.replay_buffer)  # successes, if they are replayed
        self.skipped = self.skipped_in_a_row = 0
        self.elsewhere = collections.Counter()  # `players.counts` of the other ranks

    @torch.no_grad()
    def values(self, prompts):
        """V of each prompt, (N,) on the CPU."""
        size = self.args.micro_batch
        return torch.cat(
            [self.critic(self.players.features(prompts[i : i + size])).cpu() for i in range(0, len(prompts), size)]
        )

    @torch.no_grad()
    def log_prob(self, prompts, menus, action):
        """log pi of the actions taken, (N,) on the CPU."""
        size, found = self.args.micro_batch, []
        for i in range(0, len(prompts), size):
            log_probs = self.players.log_probs(prompts[i : i + size], menus[i : i + size]).cpu()  # (M, A)
            found.append(log_probs.gather(1, action[i : i + size, None])[:, 0])
        return torch.cat(found)

    def final_prompts(self, episodes):
        """The prompts that would have come next where the horizon cut an episode off."""
        states = [episode.final_state for episode in episodes]
        reflections = self.players.reflect(states) if self.players.reflection else [None] * len(states)
        return [
            self.players.prompt(s, r, e.final_actions) for s, r, e in zip(states, reflections, episodes, strict=True)
        ]

    def update(self, batch, step, left):
        """The gradient steps on one batch; `left` is the share of the run still to come. Returns the figures to log."""
        args, sums = self.args, collections.Counter()
        warm = min(1.0, (step + 1) / max(1, args.warmup))
        for group, peak in zip(self.optimizer.param_groups, self.peak, strict=True):
            group["lr"] = peak * warm * (0.2 + 0.8 * left)
        for epoch in range(args.epochs):
            order = random.Random(f"{args.seed}/{step}/{epoch}").sample(range(len(batch.prompts)), len(batch.prompts))
            size = -(-len(order) // args.minibatches)
            for start in range(0, len(order), size):
                norm = self.minibatch(batch, order[start : start + size], args.entropy * left, sums)
                sums["grad_norm"] += norm
                sums["gradient_steps"] += 1
            approx_kl = from_first(lambda some=order[:128]: self.approx_kl(batch, some))
            if args.target_kl and approx_kl > 1.5 * args.target_kl:
                break
        sums = summed(sums)
        figures = {key: sums[key] / sums["steps"] for key in ("entropy", "clip_fraction", "kl_sft") if key in sums}
        figures |= {
            "approx_kl": approx_kl,
            "grad_norm": sums["grad_norm"] / sums["gradient_steps"],
            "skipped": self.skipped,
        }
        if self.critic:
            unexplained = (batch.returns - batch.old_value).var(correction=0) / (batch.returns.var(correction=0) + 1e-8)
            figures["explained_variance"] = 1 - unexplained.item()
        return figures

    def minibatch(self, batch, chosen, entropy_bonus, sums):
        """One optimizer step on the chosen steps, this rank's share in micro-batches; the gradient norm."""
        mine = sorted(
            chosen[rank() :: world()], key=lambda i: (len(batch.prompts[i]), batch.prompts[i])
        )  # equal prompts together
        for start in range(0, len(mine), self.args.micro_batch):
            part = mine[start : start + self.args.micro_batch]
            loss = self.loss(batch, part, entropy_bonus, sums)
            (
                loss * len(part) / len(chosen)
            ).backward()  # summed over micro-batches and ranks: the whole batch's gradient
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        norms = [nn.utils.clip_grad_norm_(group["params"], self.args.clip) for group in self.optimizer.param_groups]
        if all(map(torch.isfinite, norms)):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:  # the weights are still good: leave the step out
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row == 5:
                raise UserError(
                    "five gradients in a row were not finite: try a smaller --rl-lr, or --bf16 off; "
                    "the last checkpoint is good"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return norms[0].item()

    def loss(self, batch, part, entropy_bonus, sums):
        """The loss of some steps, a scalar: policy, minus entropy bonus, plus KL to the SFT policy, plus critic."""
        args, players = self.args, self.players
        prompts, menus = [batch.prompts[i] for i in part], [batch.menus[i] for i in part]
        on_device = lambda values: values[part].to(players.device)  # noqa: E731
        features = players.features(prompts)  # (M, d)
        log_probs = players.score(features, menus)  # (M, A)
        log_prob = log_probs.gather(1, on_device(batch.action)[:, None])[:, 0]  # (M,)
        advantage, old, mask = on_device(batch.advantage), on_device(batch.old_log_prob), torch.ones_like(log_prob)
        ratio = (log_prob.detach() - old).exp()
        if args.algo in ("ppo", "grpo"):
            loss = ppo_loss(log_prob, old, advantage, mask, args.clip_ratio)
        else:
            loss = policy_gradient_loss(log_prob, advantage, mask)
        bits = entropy(log_probs)
        loss = loss - entropy_bonus * bits.mean()
        sums["steps"] += len(part)
        sums["entropy"] += bits.sum().item()
        sums["clip_fraction"] += ((ratio - 1).abs() > args.clip_ratio).sum().item()
        if args.kl:
            with torch.no_grad():
                reference = players.score(players.features(prompts, "sft"), menus)
            kl = kl_divergence(log_probs, reference)
            loss = loss + args.kl * kl.mean()
            sums["kl_sft"] += kl.sum().item()
        if self.critic:
            loss = loss + critic_loss(
                self.critic(features), on_device(batch.old_value), on_device(batch.returns), args.clip_value
            )
        return loss

    def approx_kl(self, batch, some):
        """KL(before || after the update) in nats: the mean of ratio - 1 - log ratio over some steps (Schulman 2020)."""
        now = self.log_prob([batch.prompts[i] for i in some], [batch.menus[i] for i in some], batch.action[some])
        log_ratio = now - batch.old_log_prob[some]
        return (log_ratio.exp() - 1 - log_ratio).mean().item()

    def counts(self):
        """`players.counts` of all ranks together; every rank has to call it. `state` saves what it found elsewhere."""
        total = summed(self.players.counts)
        self.elsewhere = total - self.players.counts
        return total

    def state(self):
        """All that the next update depends on, but the adapters; `torch.load(weights_only=True)` reads it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "buffer": [dataclasses.asdict(episode) for episode in self.buffer],
            "skipped": [self.skipped, self.skipped_in_a_row],
            "counts": dict(self.players.counts + self.elsewhere),
            "memo": dict(self.players.memo),
        }  # texts, not to be made again: other batch mates might round differently

    def load_state(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.buffer.extend(Episode(**(e | {"steps": tuple(Step(**s) for s in e["steps"])})) for e in state["buffer"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if rank() == 0:  # they are those of all ranks together
            self.players.counts.update(state["counts"])
        self.players.memo.update(state["memo"])


# ---------------------------------------------------------------------------------------------------------
# The run


def run_name(args):
    flags = {
        args.algo: args.algo != "reinforce",
        "no-reflection": not args.reflection,
        "no-negatives": not args.negatives,
        "no-curriculum": not args.curriculum,
        "replay": args.replay,
    }
    return args.name or "-".join(
        [short_name(args.env), "rl", *(flag for flag, on in flags.items() if on), f"s{args.seed}"]
    )


def start_run(args, run, sft_adapters):
    """Players, learner and progress of a new or resumed run."""
    where = (
        "runs",
        "resume",
        "device",
        "name",
        "bf16",
        "micro_batch",
        "repeats",
        "data",
        "split",
        "show_every",
        "save_every",
        "keep",
        "tensorboard",
    )  # may differ on resume
    config = {key: value for key, value in vars(args).items() if key not in where}
    checkpoint = from_first(lambda: open_run(run, config, args.resume))
    # adapters and optimizer of one moment: not the run's final adapters, which may be half written
    adapters = {name: checkpoint / name for name in sft_adapters} if checkpoint else sft_adapters
    players = load_players(args, adapters)
    if args.kl:
        load_adapter(players.model, "sft", sft_adapters["policy"])
    learner = Learner(players, args)
    if not checkpoint:
        return players, learner, {"step": 0, "episodes": 0, "stage": ""}
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    learner.load_state(state)
    return players, learner, {key: state[key] for key in ("step", "episodes", "stage")}


def train(args, sft_adapters):
    """The loop above, `args.updates` times: play, update, log, evaluate, save. Returns the run's folder."""
    run, make_env = Path(args.runs) / run_name(args), env_factory(args)
    with lock_run(run) if rank() == 0 else contextlib.nullcontext(), stop_signals() as stopping:
        players, learner, progress = start_run(args, run, sft_adapters)
        env, board = make_env(), tensorboard(run, args, progress["episodes"])
        plan, tasks = curriculum.schedule(curriculum.stages_of(env, args.curriculum), args.updates), env.tasks("train")
        bar = tqdm(
            total=args.updates,
            initial=progress["step"],
            desc=run.name,
            unit="update",
            disable=None if rank() == 0 else True,
        )
        if rank() == 0 and args.eval_every and not progress["step"]:
            figures = validate(players, make_env, args)
            log_line(run, **progress, **figures)
            tqdm.write(
                f"before any update: valid success {figures['valid_success']:4.0%} of {figures['valid_episodes']}"
            )
        for step in range(progress["step"], args.updates):
            stage, began = plan[step], time.perf_counter()
            if stage.name != progress["stage"]:
                learner.buffer.clear()  # other rewards, other starts: old successes would mislead
            chosen = random.Random(f"{args.seed}/tasks/{step}").choices(
                stage.select(tasks), k=args.episodes // args.group
            )
            chosen = [task for task in chosen for _ in range(args.group)]
            episodes = play_together(players, make_env, chosen, stage.options, args.seed, step * args.episodes)
            batch = make_batch(learner, episodes, args, replayed(learner, args, step))
            figures = learner.update(batch, step, left=1 - step / args.updates)
            learner.buffer.extend(episode for episode in episodes if args.replay and episode.success)
            progress = {"step": step + 1, "episodes": progress["episodes"] + len(episodes), "stage": stage.name}
            figures = summarise(learner, episodes, figures, time.perf_counter() - began)
            last, stop = step + 1 == args.updates, agreed(stopping)
            if rank() == 0:
                if last or (args.eval_every and (step + 1) % args.eval_every == 0):
                    figures |= validate(players, make_env, args)
                report(run, progress, figures, episodes, bar, board, args)
                if last or stop or (step + 1) % args.save_every == 0:
                    save_checkpoint(
                        run,
                        step + 1,
                        lambda folder, now=progress: save_run(players, learner, now, folder),
                        keep=args.keep,
                    )
            if stop:
                if world() > 1:
                    dist.barrier()  # rank 0 may still be saving, and torchrun kills the others when one leaves
                sys.exit(f"stopped after update {step + 1}; go on with --resume")
        if rank() == 0:
            finish(players, run)
        if stopping and rank() == 0:  # the others have nothing left to do, and their failure would end rank 0's saving
            sys.exit(f"{run} is trained; --resume evaluates it")
    return run


def validate(players, make_env, args):
    """Success on the validation starts, sampled: `{"valid_success": share, "valid_episodes": count}`."""
    found = evaluation.summary(evaluation.evaluate(players, make_env, "valid", repeats=args.repeats))
    return {"valid_success": found["success"], "valid_episodes": found["episodes"]}


def play_together(players, make_env, tasks, options, seed, first):
    """The episodes of all tasks, in their order; each rank plays its share. Their RNGs depend on nothing else."""
    numbers = range(rank(), len(tasks), world())
    players.known.clear()  # whether or not there was an evaluation before: a resumed run must round alike
    share = play(
        players, make_env, [tasks[i] for i in numbers], options=options, seed=seed, numbers=[first + i for i in numbers]
    )
    return gathered(share)


def replayed(learner, args, step):
    """Some earlier successes of this stage, to be learned from again with truncated importance weights."""
    count = min(args.replay, len(learner.buffer))
    return random.Random(f"{args.seed}/replay/{step}").sample(list(learner.buffer), count)


def summarise(learner, episodes, figures, seconds):
    """The figures of an update; success, return, length and failures are those of the whole batch of fresh episodes."""
    found = evaluation.summary(episodes)
    kept = {key: found[key] for key in ("success", "return", "length", "failed")}
    seen = learner.counts()
    return (
        kept
        | figures
        | {
            "cache_hits": seen["hits"] / max(1, seen["hits"] + seen["misses"]),
            "cut_reflections": seen["cuts"],
            "episodes_per_s": len(episodes) / seconds,
        }
    )


def report(run, progress, figures, episodes, bar, board, args):
    """Log line, progress bar, warnings, and now and then one whole episode."""
    step = progress["step"]
    log_line(run, **progress, **figures)
    bar.update()
    bar.set_postfix(
        stage=progress["stage"],
        success=f"{figures['success']:.0%}",
        ret=f"{figures['return']:.2f}",
        len=f"{figures['length']:.0f}",
        H=f"{figures['entropy']:.2f}",
        kl=f"{figures['approx_kl']:.3f}",
    )
    if board:
        for key, value in figures.items():
            board.add_scalar(key, value, progress["episodes"])
    if "valid_success" in figures:
        tqdm.write(
            f"update {step:4} {progress['stage']:8} training success {figures['success']:4.0%}, "
            f"entropy {figures['entropy']:.2f}, "
            f"valid success {figures['valid_success']:4.0%} of {figures['valid_episodes']}, "
            f"{figures['episodes_per_s']:.1f} episodes/s"
        )
    if len({round(episode.total, 6) for episode in episodes}) == 1:
        tqdm.write(f"update {step}: every episode had the same return, there is nothing to learn from")
    if figures["entropy"] < 0.005 and figures["success"] < 0.9:
        tqdm.write(
            f"update {step}: entropy {figures['entropy']:.4f}, the policy has stopped exploring; "
            "try a larger --entropy or shorter SFT"
        )
    if args.show_every and step % args.show_every == 0:
        tqdm.write("\n".join(show_step(s) for s in episodes[0].steps))


def save_run(players, learner, progress, folder):
    save_players(players, folder)
    torch.save(progress | learner.state(), folder / "state.pt")


def save_players(players, folder):
    for name in ("reflect", "policy") if players.reflection else ("policy",):
        save_adapter(players.model, name, folder / name)


def finish(players, run):
    """Write the final adapters, the policy last: where it is, the run is done, and nothing is written over it."""
    if (run / "policy" / "adapter_config.json").is_file():
        return
    try:
        save_players(players, run)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save the final adapters in {run}: {error}; the last checkpoint is good") from None


def tensorboard(run, args, episodes):
    if not args.tensorboard or rank():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs it: pip install tensorboard") from None
    return SummaryWriter(run / "tensorboard", purge_step=episodes + 1)  # a resumed run takes back what was not saved


@contextlib.contextmanager
def stop_signals():
    """A list that is filled by the first SIGINT or SIGTERM: finish the update, save, leave. One more is final, but for
    the echo of the first: torchrun passes on a signal that its children have had already."""
    received, before = [], {}

    def note(number, frame):
        if received and time.monotonic() > received[0] + 1:
            sys.exit(130)
        received.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(stopping):
    """Whether any rank was asked to stop."""
    return summed(collections.Counter(stop=len(stopping)))["stop"] > 0


# ---------------------------------------------------------------------------------------------------------


def add_rl_options(parser):
    group = parser.add_argument_group("online stage")
    group.add_argument(
        "--algo",
        choices=("reinforce", "ppo", "grpo", "rloo"),
        default="reinforce",
        help="see the top of rl.py (default: reinforce)",
    )
    group.add_argument("--updates", type=int, default=100, help="batches of episodes (default: 100)")
    group.add_argument("--episodes", type=int, default=32, help="episodes a batch (default: 32)")
    group.add_argument(
        "--rl-lr", type=float, default=1e-3, help="peak learning rate; falls linearly to a fifth (default: 1e-3)"
    )
    group.add_argument("--warmup", type=int, help="updates over which it rises first (default: a tenth of --updates)")
    group.add_argument("--entropy", type=float, default=0.03, help="entropy bonus; falls linearly to 0 (default: 0.03)")
    group.add_argument("--gamma", type=float, default=0.97, help="discount (default: 0.97)")
    group.add_argument("--clip", type=float, default=0.3, help="largest gradient norm (default: 0.3, the paper's)")
    group.add_argument("--kl", type=float, default=0.0, help="weight of the exact KL to the SFT policy (default: 0)")
    group.add_argument(
        "--group", type=int, help="episodes of one task in a batch (default: 4 for grpo and rloo, else 1)"
    )
    group.add_argument("--epochs", type=int, help="passes over a batch (default: 3 for ppo, 2 for grpo, else 1)")
    group.add_argument("--minibatches", type=int, help="gradient steps a pass (default: 2 for ppo, else 1)")
    group.add_argument("--clip-ratio", type=float, default=0.2, help="PPO's epsilon (default: 0.2)")
    group.add_argument(
        "--target-kl",
        type=float,
        help="leave the passes over a batch early above 1.5 times this (default: 0.03 for ppo and grpo)",
    )
    group.add_argument("--gae-lambda", type=float, default=0.95, help="lambda of GAE (default: 0.95)")
    group.add_argument("--critic-lr", type=float, default=3e-3, help="learning rate of the critic (default: 3e-3)")
    group.add_argument(
        "--clip-value", type=float, default=0.5, help="largest step of the critic's value (default: 0.5)"
    )
    group.add_argument(
        "--replay",
        type=int,
        default=0,
        help="earlier successes learned from again in each batch (default: 0; reinforce and ppo)",
    )
    group.add_argument("--replay-buffer", type=int, default=256, help="successes kept for that (default: 256)")
    group.add_argument("--no-reflection", dest="reflection", action="store_false", help="ablation: no reflector")
    group.add_argument(
        "--no-curriculum",
        dest="curriculum",
        action="store_false",
        help="ablation: the task itself from the first update",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--eval-every",
        type=int,
        default=10,
        help="updates between evaluations on the valid split, 0 = after the last one only (default: 10)",
    )
    group.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (default: 10)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints kept (default: 2)")
    group.add_argument(
        "--show-every", type=int, default=25, help="updates between episodes printed whole, 0 = never (default: 25)"
    )
    group.add_argument("--tensorboard", action="store_true", help="log to TensorBoard as well")
    group.add_argument("--name", help="name of the run (default: from environment, ablation and seed)")
    group.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")


def resolve(args):
    """Fill in the defaults that depend on the algorithm, and refuse what makes no sense."""
    grouped, several = args.algo in ("grpo", "rloo"), args.algo in ("ppo", "grpo")
    defaults = {
        "group": 4 if grouped else 1,
        "epochs": {"ppo": 3, "grpo": 2}.get(args.algo, 1),
        "minibatches": 2 if args.algo == "ppo" else 1,
        "target_kl": 0.03 if several else 0.0,
        "warmup": args.updates // 10,
    }
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if not several and args.epochs * args.minibatches > 1:
        raise UserError(f"{args.algo} is on-policy: one gradient step a batch; ppo and grpo take several")
    if args.replay and grouped:
        raise UserError(f"{args.algo} compares episodes of one task; --replay goes with reinforce and ppo")
    if grouped and args.group < 2 or args.episodes < 2 and args.algo == "reinforce":
        what = "group" if grouped else "episodes"
        raise UserError(f"{args.algo} compares episodes: --{what} must be at least 2, not {getattr(args, what)}")
    if args.episodes % args.group:
        raise UserError(f"--episodes {args.episodes} cannot be divided into groups of {args.group} (--group)")


def main():
    parser = argparse.ArgumentParser(description="The whole pipeline: data, SFT, RL, evaluation.", allow_abbrev=False)
    add_common_options(parser)
    sft.add_sft_options(parser)
    add_rl_options(parser)
    evaluation.add_panel_options(parser.add_argument_group("evaluation"))
    args = parse_args(parser)
    resolve(args)
    env_factory(args)().tasks(args.split)  # an unknown split is noticed now, not after the training
    start = sft.sft_folder(args)
    if os.environ.get("RANK", "0") == "0":  # torchrun: the other processes wait for this one
        sft.sft_run(args, ["plain", "reflect", "policy"] if args.reflection else ["plain"])
    join_processes(args)
    run = train(args, find_adapters(start) if args.reflection else evaluation.plain_adapters(start))
    if rank() == 0:
        rows = evaluation.baseline_rows(args)
        evaluation.print_table(rows + evaluation.run_rows(start, args) + evaluation.run_rows(run, args))


if __name__ == "__main__":
    envs.run_main(main)
