"""Evaluation: success rates with intervals on a fixed panel, baselines, tables, curves.

One panel a split, the same for everything that is compared: every task of the split, played `--repeats` times when
actions are sampled (temperature 1), once when they are greedy. Success is the environment's own verdict. Intervals are
95% Wilson; sampled repeats of one start are not quite independent, so theirs are a little too narrow.

    python eval.py --env taxi              # a table of all runs found
    python eval.py --run runs/taxi-rl-s0 --show 2
    python eval.py --plot curves.png       # success over episodes of all RL runs (needs matplotlib)
    python eval.py --reproduce             # run the experiments of the README's table, then print it
"""

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import envs
from envs import UserError
from reflect_rl import (
    add_common_options,
    as_trained,
    env_factory,
    find_adapters,
    load_players,
    newest_run,
    parse_args,
    play,
    read_config,
    runs_of,
    show_step,
)


def wilson(successes, n, z=1.96):
    """95% Wilson score interval of a success rate, `(low, high)`."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def summary(episodes):
    """Figures of a list of episodes; `failed` is the share that the environment ended badly (taxi: by danger)."""
    n, successes = len(episodes), sum(episode.success for episode in episodes)
    ends = [episode.steps[-1] for episode in episodes]
    return {
        "episodes": n,
        "success": successes / n,
        "interval": wilson(successes, n),
        "return": sum(episode.total for episode in episodes) / n,
        "length": sum(len(episode.steps) for episode in episodes) / n,
        "failed": sum(end.terminated and not end.success for end in ends) / n,
    }


def random_actor(states, actions, envs):
    """An actor (see `reflect_rl.play`) that takes every valid action equally often."""
    return [None] * len(states), [[-math.log(len(a))] * len(a) for a in actions]


def expert_actor(states, actions, envs):
    """An actor that takes the environment's expert action."""
    choices = [env.expert_action() for env in envs]
    return [None] * len(states), [
        [0.0 if i == c else -math.inf for i in range(len(a))] for a, c in zip(actions, choices, strict=True)
    ]


def baseline_rows(args):
    """Lines of the table for random play and, where the environment has one, for its expert."""
    rows = [row("random", random_actor, env_factory(args), args)]
    no_expert = envs.Env.expert_action
    if getattr(envs.env_class(args.env), "expert_action", no_expert) is not no_expert:
        rows.append(row("expert", expert_actor, env_factory(args), args))
    return rows


def panel(env, split, size=120):
    """The tasks of a split that everything is evaluated on: all, or a fixed sample where there are more than `size`."""
    tasks = env.tasks(split)
    return tasks if len(tasks) <= size else random.Random(0).sample(tasks, size)


def evaluate(actor, make_env, split="test", repeats=3, greedy=False, seed=1000, limit=None):
    """Play the panel of a split; the episodes. `limit` takes the first tasks only (for a quick look while training)."""
    tasks = panel(make_env(), split)[:limit]
    if not tasks:
        raise UserError(f"the {split} split has no tasks")
    return play(actor, make_env, tasks * (1 if greedy else repeats), seed=seed, greedy=greedy)


def by_group(episodes, env):
    """`{group: summary}` of the episodes, by what `env.groups` says of their tasks; sorted by name."""
    groups = {}
    for episode in episodes:
        for group in env.groups(episode.task) if hasattr(env, "groups") else ():
            groups.setdefault(group, []).append(episode)
    return {group: summary(groups[group]) for group in sorted(groups)}


def row(name, actor, make_env, args):
    """A line of the table: sampled and greedy figures of one actor, and the sampled ones by group of tasks."""
    episodes = evaluate(actor, make_env, args.split, args.repeats)
    greedy = summary(evaluate(actor, make_env, args.split, greedy=True)) if actor is not random_actor else None
    groups = by_group(episodes, make_env())
    return {"name": name, "split": args.split, "sampled": summary(episodes), "greedy": greedy, "groups": groups}


def rate(figures):
    """The cells of a success rate: `["93.3%", "[89.7%, 95.7%]", "270"]`, dashes where there is none."""
    if not figures:
        return ["-", "-", "-"]
    low, high = figures["interval"]
    return [f"{figures['success']:.1%}", f"[{low:.1%}, {high:.1%}]", str(figures["episodes"])]


def print_table(rows):
    """The rows as a Markdown table that can be read as it is."""
    print(f"\nSuccess on the {rows[0]['split']} split, 95% Wilson intervals; failed: ended badly by the environment\n")
    lines = [["", "sampled", "interval", "n", "return", "length", "failed", "greedy", "interval", "n"]]
    for r in rows:
        s = r["sampled"]
        middle = [f"{s['return']:.2f}", f"{s['length']:.1f}", f"{s['failed']:.1%}"]
        lines.append([r["name"], *rate(s), *middle, *rate(r["greedy"])])
    print_lines(lines)
    if rows[0]["groups"]:
        print("\nThe sampled episodes by group of tasks\n")
        lines = [["", "group", "success", "interval", "n"]]
        print_lines(lines + [[r["name"], group, *rate(found)] for r in rows for group, found in r["groups"].items()])


def print_lines(lines):
    """A Markdown table; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    for name, *cells in lines:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("| " + " | ".join([f"{name:{widths[0]}}", *padded]) + " |")


def run_rows(run, args):
    """The lines of one run, played as it was trained: an RL run has one policy, an SFT run up to two."""
    config, rows = read_config(run), []
    if "updates" in config:
        names = [(run.name, find_adapters)]
    else:
        names = [(f"{run.name} without reflection", plain_adapters), (f"{run.name} with reflection", find_adapters)]
    for name, find in names:
        try:
            adapters = find(run)
        except UserError:
            continue
        options = as_trained(args, config)
        rows.append(row(name, load_players(options, adapters), env_factory(options), args))
    return rows


def plain_adapters(run):
    """The policy of an SFT run that was trained without reflections."""
    if not (Path(run) / "plain" / "adapter_config.json").is_file():
        raise UserError(f"{run} has no stage plain")
    return {"policy": Path(run) / "plain"}


def plot(args):
    """Success of all RL runs over training episodes, to the file `args.plot`: each seed a thin line, their mean a
    thick one where all of them have been evaluated."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    curves = {}  # kind of run -> the points of its seeds
    for log in [run / "log.jsonl" for run in runs_of(args) if (run / "log.jsonl").is_file()]:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]  # or half written
        points = {line["episodes"]: line["valid_success"] for line in lines if "valid_success" in line}
        if points:
            curves.setdefault(re.sub(r"-s\d+$", "", log.parent.name), []).append(points)
    if not curves:
        raise UserError(f"no run of {args.env} in {args.runs} has been evaluated yet")
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind, seeds in curves.items():
        shared = sorted(set.intersection(*map(set, seeds)))
        mean = [statistics.fmean(points[at] for points in seeds) for at in shared]
        label = f"{kind}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        [line] = axes.plot(shared, mean, marker="o", markersize=3, label=label)
        for points in seeds:
            axes.plot(points.keys(), points.values(), color=line.get_color(), linewidth=0.7, alpha=0.35)
    axes.set(xlabel="training episodes", ylabel="success on the validation starts (sampled)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.plot, dpi=130, bbox_inches="tight")
    print(f"wrote {args.plot}")


def add_panel_options(group):
    group.add_argument("--split", default="test", help="split of the panel (default: test)")
    group.add_argument("--repeats", type=int, default=3, help="sampled episodes per start (default: 3)")


def reproduce(args):
    """Run the commands behind the README's table, one after the other; runs that exist are kept."""
    for flags in ([], ["--no-reflection"], ["--no-negatives"], ["--no-curriculum"]):
        for seed in ("0", "1", "2"):
            command = [
                sys.executable,
                str(Path(__file__).parent / "rl.py"),
                "--env",
                args.env,
                "--runs",
                args.runs,
                "--seed",
                seed,
                "--resume",
                *flags,
            ]
            print("$", " ".join(command[1:]), flush=True)
            subprocess.run(command, check=True)


def main():
    parser = argparse.ArgumentParser(description="Success rates, tables, curves.", allow_abbrev=False)
    add_common_options(parser)
    group = parser.add_argument_group("evaluation")
    add_panel_options(group)
    group.add_argument("--run", help="evaluate this run only (default: all of the environment)")
    group.add_argument("--show", type=int, default=0, metavar="N", help="print the first N sampled episodes of --run")
    group.add_argument("--plot", metavar="FILE", help="draw the learning curves instead")
    group.add_argument(
        "--reproduce", action="store_true", help="first run seeds 0, 1, 2 and all ablations, as the README does"
    )
    args = parse_args(parser)
    if args.plot:
        return plot(args)
    if args.reproduce:
        reproduce(args)
    if args.show:
        run = args.run or newest_run(args)
        options = as_trained(args, read_config(run))
        players = load_players(options, find_adapters(run))
        for episode in evaluate(players, env_factory(options), args.split, repeats=1, limit=args.show):
            print("\n".join(show_step(step) for step in episode.steps))
    rows = [] if args.run else baseline_rows(args)
    for run in [Path(args.run)] if args.run else runs_of(args):
        rows += run_rows(run, args)
    if not rows:
        raise UserError(f"{args.run} holds no policy yet: it was stopped before its first checkpoint")
    print_table(rows)


if __name__ == "__main__":
    envs.run_main(main)
