"""The online stage: the reflector is frozen, the policy learns by policy gradient (paper, section 4.3 and algorithm 1).

    repeat: play a batch of episodes        r_t, log pi(a_t | s_t, reflection_t, A(s_t))
            returns-to-go                   G_t = r_t + gamma G_{t+1}
            advantages                      (G_t - b_t) / std
            one gradient step on            - E[ A_t log pi(a_t) ] - beta E[ H(pi) ]

b_t is the mean return-to-go of all episodes of the batch at time t. Left out on purpose: no critic, no importance
weights (each batch is used once, on policy). Deviation: the paper plays 1-2 episodes an update, we play 32, since
identical prompts of a batch share a forward pass and the frozen reflector's texts are memoised.

    python rl.py                           # data, SFT, RL, evaluation on DangerousTaxi: the whole pipeline
    python rl.py --no-reflection           # an ablation; also --no-negatives, --no-curriculum
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

import curriculum
import envs
import eval as evaluation
import sft
from envs import UserError
from reflect_rl import (adapter_parameters, add_common_options, env_factory, find_adapters, load_adapter, load_players, log_line, open_run,
                        parse_args, play, save_adapter, save_checkpoint, short_name, show_step)

# ---------------------------------------------------------------------------------------------------------
# The algorithm


def returns_to_go(rewards, gamma):
    """G_t = r_t + gamma G_{t+1} of one episode, a list. Truncation counts as the end: without a critic there is nothing
    to bootstrap from, and a generous horizon keeps the bias small."""
    returns, G = [], 0.0
    for reward in reversed(rewards):
        G = reward + gamma * G
        returns.append(G)
    return returns[::-1]


def advantages(episodes, gamma):
    """Returns-to-go minus their mean over the batch at the same time step, over their standard deviation: a flat (N,)
    tensor in the order of the steps."""
    returns = [returns_to_go([step.reward for step in episode.steps], gamma) for episode in episodes]
    longest = max(map(len, returns))
    baseline = [sum(at_t) / len(at_t) for t in range(longest) if (at_t := [G[t] for G in returns if t < len(G)])]
    centered = torch.tensor([G_t - baseline[t] for G in returns for t, G_t in enumerate(G)])
    return centered / (centered.std() + 1e-6)


def policy_gradient_loss(log_prob, advantage, mask):
    """REINFORCE (equation 3): minus the mean of A log pi over the steps that count; all (N,). Only its gradient means anything."""
    return -(log_prob * advantage * mask).sum() / mask.sum()


def entropy(log_probs):
    """Entropy in nats of each row of log-probabilities (N, A); invalid actions are -inf and count nothing. (N,)"""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def update(players, optimizer, episodes, args, entropy_bonus):
    """One gradient step of the policy's adapter on a batch of episodes; the figures of the update."""
    steps = [step for episode in episodes for step in episode.steps]
    prompts = [players.prompt(step.state, step.reflection, step.actions) for step in steps]
    advantage, chosen = advantages(episodes, args.gamma), torch.tensor([step.action for step in steps])
    order = sorted(range(len(steps)), key=lambda i: (len(prompts[i]), prompts[i]))  # equal prompts side by side, little padding
    total_entropy, difference = 0.0, 0.0
    for start in range(0, len(order), args.micro_batch):
        batch = order[start : start + args.micro_batch]
        log_probs = players.log_probs([prompts[i] for i in batch], [len(steps[i].actions) for i in batch])  # (M, A)
        log_prob = log_probs.gather(1, chosen[batch, None].to(log_probs.device))[:, 0]  # (M,)
        bits, mask = entropy(log_probs), torch.ones_like(log_prob)
        loss = policy_gradient_loss(log_prob, advantage[batch].to(log_prob.device), mask) - entropy_bonus * bits.mean()
        (loss * len(batch) / len(steps)).backward()  # summed over micro-batches: the gradient of the whole batch
        total_entropy += bits.sum().item()
        rollout = torch.tensor([steps[i].log_prob for i in batch], device=log_prob.device)
        difference = max(difference, (log_prob.detach() - rollout).abs().max().item())
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], args.clip)
    if not torch.isfinite(norm):
        raise UserError("the gradient is not finite: try a smaller --rl-lr, or --bf16 off")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"entropy": total_entropy / len(steps), "grad_norm": norm.item(), "log_prob_difference": difference}


# ---------------------------------------------------------------------------------------------------------
# The run


def run_name(args):
    flags = [flag for flag, off in (("no-reflection", not args.reflection), ("no-negatives", not args.negatives),
                                    ("no-curriculum", not args.curriculum)) if off]
    return args.name or "-".join([short_name(args.env), "rl", *flags, f"s{args.seed}"])


def train(args, sft_adapters):
    """Algorithm 1: play, update, log, evaluate, save, `args.updates` times. Returns the run's folder and the players."""
    run, make_env = Path(args.runs) / run_name(args), env_factory(args)
    config = {key: value for key, value in vars(args).items() if key not in ("runs", "resume", "device", "name", "bf16", "repeats", "data")}
    checkpoint = open_run(run, config, args.resume)
    players = load_players(args, find_adapters(run) if checkpoint else sft_adapters, max_reflection=args.max_reflection)
    for parameter in players.model.parameters():
        parameter.requires_grad_(False)
    parameters = adapter_parameters(players.model, "policy")  # the reflector stays frozen
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=args.rl_lr, weight_decay=0.0)
    start = episodes_so_far = 0
    if checkpoint:
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        start, episodes_so_far = state["step"], state["episodes"]
        optimizer.load_state_dict(state["optimizer"])
        players.memo.update(state["memo"])  # texts, not recomputed: other batch mates might round differently

    def save(folder):
        save_players(players, folder)
        torch.save({"step": step + 1, "episodes": episodes_so_far, "optimizer": optimizer.state_dict(), "memo": dict(players.memo)}, folder / "state.pt")

    plan = curriculum.schedule(curriculum.stages_of(make_env(), args.curriculum), args.updates)
    tasks = make_env().tasks("train")
    bar = tqdm(range(start, args.updates), initial=start, total=args.updates, desc=run.name, unit="update", disable=None)
    for step in bar:
        stage, began = plan[step], time.perf_counter()
        left = 1 - step / args.updates  # learning rate and entropy bonus fall linearly
        for group in optimizer.param_groups:
            group["lr"] = args.rl_lr * max(left, 0.1)
        rng = random.Random(f"{args.seed}/tasks/{step}")
        episodes = play(players, make_env, rng.choices(tasks, k=args.episodes), options=stage.options, seed=args.seed, first=step * args.episodes)
        figures = update(players, optimizer, episodes, args, args.entropy * left)
        episodes_so_far += len(episodes)
        line = log_figures(players, episodes, stage, figures, time.perf_counter() - began)
        if args.eval_every and (step + 1) % args.eval_every == 0 or step + 1 == args.updates:
            found = evaluation.summary(evaluation.evaluate(players, make_env, "valid", repeats=args.repeats))
            line |= {"valid_success": found["success"], "valid_episodes": found["episodes"]}
        log_line(run, step=step + 1, episodes=episodes_so_far, **line)
        bar.set_postfix(stage=stage.name, success=f"{line['success']:.0%}", ret=f"{line['return']:.2f}", H=f"{line['entropy']:.2f}")
        if args.show_every and (step + 1) % args.show_every == 0:
            tqdm.write("\n".join(show_step(s) for s in episodes[0].steps))
        if (step + 1) % args.save_every == 0 or step + 1 == args.updates:
            save_checkpoint(run, step + 1, save)
    save_players(players, run)
    return run, players


def save_players(players, folder):
    for name in ("reflect", "policy") if players.reflection else ("policy",):
        save_adapter(players.model, name, folder / name)


def log_figures(players, episodes, stage, figures, seconds):
    """A line of `log.jsonl`; every figure is of the whole batch of episodes."""
    found = evaluation.summary(episodes)
    return {"stage": stage.name, "success": found["success"], "return": found["return"], "length": found["length"], "failed": found["failed"],
            **figures, "cache_hits": players.hits / max(1, players.hits + players.misses), "cut_reflections": players.cuts,
            "episodes_per_s": len(episodes) / seconds}


def add_rl_options(parser):
    group = parser.add_argument_group("online stage")
    group.add_argument("--updates", type=int, default=100, help="gradient steps (default: 100)")
    group.add_argument("--episodes", type=int, default=32, help="episodes an update (default: 32)")
    group.add_argument("--rl-lr", type=float, default=3e-4, help="peak learning rate; falls linearly to a tenth (default: 3e-4)")
    group.add_argument("--entropy", type=float, default=0.03, help="entropy bonus; falls linearly to 0 (default: 0.03)")
    group.add_argument("--gamma", type=float, default=0.97, help="discount (default: 0.97)")
    group.add_argument("--clip", type=float, default=0.3, help="largest gradient norm (default: 0.3, the paper's)")
    group.add_argument("--eval-every", type=int, default=10, help="updates between evaluations on the valid split, 0 = never (default: 10)")
    group.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (default: 10)")
    group.add_argument("--show-every", type=int, default=25, help="updates between episodes printed whole, 0 = never (default: 25)")
    group.add_argument("--name", help="name of the run (default: from environment, ablation and seed)")
    group.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    group.add_argument("--no-reflection", dest="reflection", action="store_false", help="ablation: no reflector")
    group.add_argument("--no-curriculum", dest="curriculum", action="store_false", help="ablation: the task itself from the first update")


def main():
    parser = argparse.ArgumentParser(description="The whole pipeline: data, SFT, RL, evaluation.", allow_abbrev=False)
    add_common_options(parser)
    sft.add_sft_options(parser)
    add_rl_options(parser)
    evaluation.add_panel_options(parser.add_argument_group("evaluation"))
    args = parse_args(parser)
    make_env = env_factory(args)
    start = sft.sft_run(args, ["plain", "reflect", "policy"] if args.reflection else ["plain"])
    adapters = find_adapters(start) if args.reflection else evaluation.plain_adapters(start)
    run, players = train(args, adapters)
    rows = [evaluation.row("random", evaluation.random_actor, make_env, args), evaluation.row("expert", evaluation.expert_actor, make_env, args)]
    evaluation.print_table(rows + evaluation.run_rows(start, args) + evaluation.run_rows(run, args))


if __name__ == "__main__":
    envs.run_main(main)
