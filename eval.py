"""Evaluation: success rates with intervals on a fixed panel, baselines, tables, curves.

One panel a split, the same for everything that is compared: every task of the split, played `--repeats` times when
actions are sampled (temperature 1), once when they are greedy. Success is the environment's own verdict. Intervals are
95% Wilson; sampled repeats of one start are not quite independent, so theirs are a little too narrow.

    python eval.py --env taxi              # a table of all runs found
    python eval.py --run runs/taxi-rl-s0 --split valid
    python eval.py --plot curves.png       # success over episodes of all RL runs (needs matplotlib)
"""

import argparse
import math
import random
import re
import statistics
from pathlib import Path

import envs
from envs import UserError
from reflect_rl import (
    COMMON, Step, adapters_of, add_options, as_trained, env_factory, load_players, parse_args,
    play, read_config, read_log, runs_of,
)

OPTIONS = {
    "split": ("test", "split of the panel"),
    "repeats": (3, "sampled episodes per start", 1),
    "run": ("", "evaluate this run only"),
    "plot": ("", "draw the learning curves to this file instead"),
}
PANEL = 120  # tasks of a split that are played, where it has more
PANEL_SEED = 1000  # of the episodes' RNGs

# ---------------------------------------------------------------------------------------------------------
# Figures


def wilson(successes, n, z=1.96):
    """95% Wilson score interval of a success rate, `(low, high)`."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def summary(episodes):
    """Shares and means over episodes; `failed`: ended badly by the environment (taxi: by danger)."""
    n = len(episodes)
    failed = sum(episode.terminated and not episode.success for episode in episodes)
    return {
        "success": sum(episode.success for episode in episodes) / n,
        "return": sum(episode.total for episode in episodes) / n,
        "length": sum(len(episode.steps) for episode in episodes) / n,
        "failed": failed / n,
    }


# ---------------------------------------------------------------------------------------------------------
# Who plays: the players, or one of these two (actors of `reflect_rl.play`)


def random_actor(episodes, known):
    """Takes every valid action equally often."""
    steps = []
    for episode in episodes:
        n = len(episode.actions)
        steps.append(Step(episode.state, episode.actions, log_probs=[-math.log(n)] * n))
    return steps


def expert_actor(episodes, known):
    """Takes the environment's expert action."""
    steps = []
    for episode in episodes:
        log_probs = [-math.inf] * len(episode.actions)
        log_probs[episode.env.expert_action()] = 0.0
        steps.append(Step(episode.state, episode.actions, log_probs=log_probs))
    return steps


def evaluate(actor, make_env, split="test", repeats=3, greedy=False, known=None):
    """Play the panel of a split; the episodes. `known`: see `reflect_rl.play`."""
    tasks = make_env().tasks(split)
    if len(tasks) > PANEL:
        tasks = random.Random(0).sample(tasks, PANEL)
    if not tasks:
        raise UserError(f"the {split} split has no tasks")
    return play(actor, make_env, tasks * (1 if greedy else repeats), seed=PANEL_SEED, greedy=greedy, known=known)


# ---------------------------------------------------------------------------------------------------------
# Tables


def row(name, actor, args):
    """A line of the table: sampled and greedy episodes of one actor, the sampled ones also by group of tasks."""
    make_env, groups, known = env_factory(args), {}, {}
    sampled, greedy = evaluate(actor, make_env, args.split, args.repeats, known=known), []
    if actor is not random_actor:
        greedy = evaluate(actor, make_env, args.split, greedy=True, known=known)
    env = make_env()
    for episode in sampled:
        for group in env.groups(episode.task):
            groups.setdefault(group, []).append(episode)
    return {"name": name, "split": args.split, "sampled": sampled, "greedy": greedy, "groups": groups}


def baseline_rows(args):
    """Random play and, where the environment has one, its expert."""
    rows = [row("random", random_actor, args)]
    if type(env_factory(args)()).expert_action is not envs.Env.expert_action:
        rows.append(row("expert", expert_actor, args))
    return rows


def run_rows(folder, args):
    """The lines of one run, played as it was trained: an RL run has one policy, an SFT run up to two."""
    folder, rows = Path(folder), []
    args, named = as_trained(args, folder), {}
    if "updates" in read_config(folder):
        named[folder.name] = adapters_of(folder)
    else:
        if (folder / "plain" / "adapter_config.json").is_file():
            named[f"{folder.name} without reflection"] = {"policy": folder / "plain"}
        if (folder / "policy" / "adapter_config.json").is_file():
            named[f"{folder.name} with reflection"] = adapters_of(folder)
    for name, adapters in named.items():
        rows.append(row(name, load_players(args, adapters), args))
    return rows


def rate(episodes):
    """The cells of a success rate: `["93.3%", "[89.7%, 95.7%]", "270"]`, dashes where nothing was played."""
    if not episodes:
        return ["-", "-", "-"]
    successes = sum(episode.success for episode in episodes)
    low, high = wilson(successes, len(episodes))
    return [f"{successes / len(episodes):.1%}", f"[{low:.1%}, {high:.1%}]", str(len(episodes))]


def print_table(rows):
    """The rows as Markdown that can be read as it is: a table of all episodes, and one by group where there are any."""
    lines = [["", "sampled", "interval", "n", "return", "length", "failed", "greedy", "interval", "n"]]
    by_group = [["", "group", "success", "interval", "n"]]
    for r in rows:
        figures = summary(r["sampled"])
        middle = [f"{figures['return']:.2f}", f"{figures['length']:.1f}", f"{figures['failed']:.1%}"]
        lines.append([r["name"], *rate(r["sampled"]), *middle, *rate(r["greedy"])])
        for group in sorted(r["groups"]):
            by_group.append([r["name"], group, *rate(r["groups"][group])])
    heading = f"Success on the {rows[0]['split']} split, 95% Wilson intervals; failed: ended badly by the environment"
    tables = {heading: lines, "The sampled episodes by group of tasks": by_group}
    for title, (head, *body) in tables.items():
        if not body:
            continue
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        print(f"\n{title}\n")
        for name, *cells in [head, ["-" * width for width in widths], *body]:
            padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            print("| " + " | ".join([f"{name:{widths[0]}}", *padded]) + " |")


# ---------------------------------------------------------------------------------------------------------
# Curves


def plot(args):
    """Success over training episodes: each seed a thin line, their mean a thick one where all were evaluated."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    curves = {}  # kind of run -> a list with {episodes: validation success} of each seed
    for folder in runs_of(args):
        points = {}
        for figures in read_log(folder):
            if "valid_success" in figures:
                points[figures["episodes"]] = figures["valid_success"]
        if points:
            curves.setdefault(re.sub(r"-s\d+$", "", folder.name), []).append(points)
    if not curves:
        raise UserError(f"no run of {args.env} in {args.runs} has been evaluated yet")

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
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


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Success rates, tables, curves.")
    add_options(parser, COMMON, OPTIONS)
    args = parse_args(parser)
    if args.plot:
        return plot(args)
    rows = [] if args.run else baseline_rows(args)
    for folder in [args.run] if args.run else runs_of(args):
        try:
            # One table, one panel: a run on other tasks or with another horizon is not compared unasked.
            if not args.run and dict(read_config(folder)["env_option"]) != dict(args.env_option):
                raise UserError(f"{folder} was trained with another --env-option: evaluate it with --run")
            rows += run_rows(folder, args)
        except UserError as error:
            if args.run:
                raise
            print(f"note: {error}")  # a run that cannot play, perhaps not yet, must not hide the others
    if not rows:
        raise UserError(f"{args.run} holds no policy yet: it was stopped before it was saved")
    print_table(rows)


if __name__ == "__main__":
    envs.run_main(main)
