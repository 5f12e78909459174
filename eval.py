"""Evaluation: success rates with intervals on a fixed panel, baselines, tables, curves.

One panel a split, the same for everything that is compared: every task of the split, played `--repeats` times when
actions are sampled (temperature 1), once when they are greedy. Success is the environment's own verdict. Intervals are
95% bootstrap over what episodes share (`Env.cluster`: a start, a room, a repository) and over seeds, since repeats of
one start are not independent; differences are paired, episode by episode. What a run has played is kept in its folder
(`episodes/`), so that its row is drawn again without playing.

    python eval.py --env taxi              # a table of all runs found
    python eval.py --run runs/taxi-rl-s0 --split valid
    python eval.py --html page.html        # the same, and the episodes to look at in a browser
    python eval.py --plot curves.png       # success over episodes of all RL runs (needs matplotlib)
"""

import argparse
import math
import random
import re
import statistics
from pathlib import Path

import numpy as np

import envs
from envs import UserError
from plumbing.curves import plot
from plumbing.episodes import digest, panel_of, read_episodes
from plumbing.jsonl import write_lines
from plumbing.options import COMMON, add_options, env_factory, parse_args
from plumbing.rows import print_markdown, write_rows
from plumbing.runs import adapters_of, as_trained, budget_of, read_config, runs_of
from reflect_rl import Step, load_players, play

OPTIONS = {
    "split": ("test", "split of the panel"),
    "repeats": (3, "sampled episodes per start", 1),
    "run": ("", "evaluate this run only"),
    "untuned": (False, "also play the base LM without adapters; a chat model through its tokenizer's template"),
    "player": ("", "also play: openai, a chat model behind an endpoint, without and with reflection", ("openai",)),
    "player_model": ("", "its name at the endpoint"),
    "json": ("", "write the rows to this file as well, a line of JSON each"),
    "html": ("", "write the episodes to this page, to look at in a browser"),
    "plot": ("", "draw the learning curves to this file instead"),
}
PANEL = 120  # tasks of a split that are played, where it has more
PANEL_SEED = 1000  # of the episodes' RNGs
DRAWS = 10_000  # of the bootstrap

# ---------------------------------------------------------------------------------------------------------
# Figures


def bootstrap(sums, counts):
    """95% bootstrap interval of `sums.sum() / counts.sum()`, `(low, high)`; both are (seeds, clusters).

    Seeds and clusters are drawn anew, with replacement (Efron 1979).
    """
    rng, (seeds, clusters) = np.random.default_rng(0), counts.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)  # how often each seed was drawn
    columns = rng.multinomial(clusters, np.full(clusters, 1 / clusters), DRAWS)
    total = ((rows @ sums) * columns).sum(1)
    return tuple(np.percentile(total / np.maximum(1, ((rows @ counts) * columns).sum(1)), [2.5, 97.5]).tolist())


def by_cluster(runs, env):
    """Successes and episodes of each seed's episodes in each cluster: two arrays, (seeds, clusters)."""
    column = {}  # cluster -> its number
    for episode in runs[0]:
        column.setdefault(env.cluster(episode.task), len(column))
    sums, counts = np.zeros((2, len(runs), len(column)))
    for seed, episodes in enumerate(runs):
        for episode in episodes:
            sums[seed, column[env.cluster(episode.task)]] += episode.success
            counts[seed, column[env.cluster(episode.task)]] += 1
    return sums, counts


def interval(runs, env):
    """95% interval of the success rate of some seeds' episodes on one panel."""
    sums, counts = by_cluster(runs, env)
    if sums.sum() in (0, counts.sum()):  # all ended alike: Wilson's interval of as many trials as there are clusters
        edge = 1.96**2 / (sums.shape[1] + 1.96**2)
        return (1 - edge, 1.0) if sums.any() else (0.0, edge)
    return bootstrap(sums, counts)


def difference(one, other, env):
    """Success of some seeds' episodes minus that of others on the same panel: `(difference, (low, high))`."""
    (a, counts), (b, _) = by_cluster(one, env), by_cluster(other, env)
    return (a - b).sum() / counts.sum(), bootstrap(a - b, counts)


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


def panel_tasks(env, split):
    """The tasks of a split that are played."""
    tasks = env.tasks(split)
    if not tasks:
        raise UserError(f"the {split} split has no tasks")
    return random.Random(0).sample(tasks, PANEL) if len(tasks) > PANEL else tasks


def evaluate(actor, make_env, split="test", repeats=3, greedy=False, known=None):
    """Play the panel of a split; the episodes. `known`: see `reflect_rl.play`."""
    tasks = panel_tasks(make_env(), split)
    return play(actor, make_env, tasks * (1 if greedy else repeats), seed=PANEL_SEED, greedy=greedy, known=known)


# ---------------------------------------------------------------------------------------------------------
# Rows: who played, and what


def row(name, make_actor, args, folder=None, adapters=(), greedy=True):
    """A line of the table: sampled and greedy episodes of one actor. With a `folder` they are kept there, or read again
    where the same players have played the same panel. `greedy=False`: the actor has no most probable action."""
    make_env, panel, known = env_factory(args), panel_of(args, adapters, PANEL), {}
    played, actor = {"sampled": [], "greedy": []}, None
    for kind in ("sampled", "greedy") if greedy else ("sampled",):
        path = folder and Path(folder) / "episodes" / f"{args.split}-{kind}-{digest(panel)[:6]}.jsonl"
        episodes = read_episodes(path) if path else None
        if episodes is None:
            actor = actor or make_actor()
            episodes = evaluate(actor, make_env, args.split, args.repeats, kind == "greedy", known)
            if path:
                write_lines(path, [panel, *episodes])
        played[kind].append(episodes)  # a list a seed, see `pooled`
    return {"name": name, "split": args.split, "env": make_env(), "budget": [budget_of(adapters)], **played}


def baseline_rows(args):
    """Random play and, where the environment has one, its expert."""
    rows = [row("random", lambda: random_actor, args, greedy=False)]
    if type(env_factory(args)()).expert_action is not envs.Env.expert_action:
        rows.append(row("expert", lambda: expert_actor, args))
    return rows


def run_rows(folder, args):
    """The lines of one run, played as it was trained: an RL run has one policy, an SFT run up to two."""
    folder, found = Path(folder), []  # (name, where its episodes are kept, its adapters)
    args = as_trained(args, folder)
    if "updates" in read_config(folder):
        found.append((folder.name, folder, adapters_of(folder)))
    else:
        if (folder / "plain" / "adapter_config.json").is_file():
            found.append((f"{folder.name} without reflection", folder / "plain", {"policy": folder / "plain"}))
        if (folder / "policy" / "adapter_config.json").is_file():
            found.append((f"{folder.name} with reflection", folder / "policy", adapters_of(folder)))
    rows = []
    for name, place, adapters in found:
        rows.append(row(name, lambda on=adapters: load_players(args, on), args, place, adapters.values()))
    return rows


def pooled(rows):
    """One row for each kind of run of which there are several seeds: `taxi-rl`, of taxi-rl-s0 and taxi-rl-s1."""
    kinds = {}  # name without the seed -> {seed: row}
    for r in rows:
        kind, seed = re.sub(r"-s\d+", "", r["name"]), re.search(r"-s(\d+)", r["name"])
        if seed:
            kinds.setdefault(kind, {})[int(seed[1])] = r
    found = []
    for kind, of_seeds in kinds.items():
        if len(of_seeds) > 1:
            seeds = [of_seeds[seed] for seed in sorted(of_seeds)]  # in one order everywhere: they are compared in pairs
            whole = {key: sum((r[key] for r in seeds), []) for key in ("sampled", "greedy", "budget")}
            found.append({**seeds[0], **whole, "name": f"{kind}, {len(seeds)} seeds", "seeds": sorted(of_seeds)})
    return found


# ---------------------------------------------------------------------------------------------------------
# Tables


def rate(runs, env):
    """The cells of a success rate: `["93.3%", "[89.7%, 95.7%]", "270"]`, dashes where nothing was played."""
    episodes = sum(runs, [])
    if not episodes:
        return ["-", "-", "-"]
    low, high = interval(runs, env)
    success = sum(episode.success for episode in episodes) / len(episodes)
    return [f"{success:.1%}", f"[{low:.1%}, {high:.1%}]", str(len(episodes))]


def budget_cells(budgets):
    """What a row was made of: records, updates (SFT of both players and RL), episodes of RL; means over seeds."""
    if not all(budgets):
        return ["-", "-", "-"]
    return [f"{statistics.fmean(budget[key] for budget in budgets):.0f}" for key in ("records", "updates", "episodes")]


def print_table(rows):
    """Markdown that can be read as it is: all episodes, those by group, and differences on the same panel."""
    rows, env = [*rows, *pooled(rows)], rows[0]["env"]
    all_of_them = [["", "records", "updates", "episodes", "sampled", "interval", "n", "return", "length", "failed",
                    "greedy", "interval", "n"]]
    by_group, differences = [["", "group", "success", "interval", "n"]], [["", "minus", "success", "interval"]]
    for r in rows:
        figures = summary(sum(r["sampled"], []))
        middle = [f"{figures['return']:.2f}", f"{figures['length']:.1f}", f"{figures['failed']:.1%}"]
        sampled, greedy = rate(r["sampled"], env), rate(r["greedy"], env)
        all_of_them.append([r["name"], *budget_cells(r["budget"]), *sampled, *middle, *greedy])
        groups = {}  # name -> the episodes of each seed
        for seed, episodes in enumerate(r["sampled"]):
            for episode in episodes:
                for group in env.groups(episode.task):
                    groups.setdefault(group, [[] for _ in r["sampled"]])[seed].append(episode)
        for group in sorted(groups):
            by_group.append([r["name"], group, *rate(groups[group], env)])
    seeds = len(rows[-1]["sampled"])  # of the pooled rows, where there are any
    for i, r in enumerate(rows):
        for other in rows[:i]:
            learned = other["name"] not in ("random", "expert", "untuned base")
            same = len(r["sampled"]) == len(other["sampled"]) == seeds and r.get("seeds") == other.get("seeds")
            if learned and same:
                gap, (low, high) = difference(r["sampled"], other["sampled"], env)
                differences.append([r["name"], other["name"], f"{gap:+.1%}", f"[{low:+.1%}, {high:+.1%}]"])
    clusters = by_cluster(rows[0]["sampled"], env)[0].shape[1]
    heading = f"Success on the {rows[0]['split']} split, 95% intervals over {clusters} clusters (and seeds); failed: " \
        "ended badly by the environment"
    tables = {heading: all_of_them, "The sampled episodes by group of tasks": by_group,
              "Differences on the same sampled episodes, paired": differences}
    for title, (head, *body) in tables.items():
        if body:
            print_markdown(title, head, body)


def main():
    parser = argparse.ArgumentParser(description="Success rates, tables, curves.")
    endpoint = envs.beside("../models/endpoint.py")
    add_options(parser, COMMON, OPTIONS, endpoint.OPTIONS)
    args = parse_args(parser)
    if args.plot:
        return plot(args)
    for name, path in (("json", args.json), ("html", args.html)):
        if path and not Path(path).resolve().parent.is_dir():  # now, and not when everything was played
            raise UserError(f"--{name} {path}: there is no such folder")
    as_run, played = as_trained(args, args.run) if args.run else args, []
    if args.player:  # first: what is wrong with an endpoint shows before the others have played
        env = env_factory(as_run)()
        played = endpoint.player_rows(as_run, env, panel_tasks(env, args.split), row)
        if args.dry_run:
            return
    rows = [] if args.run else baseline_rows(args)
    if args.untuned:
        rows.append(row("untuned base", lambda: endpoint.through_template(load_players(as_run, {})), as_run))
    rows += played
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
    if args.json:
        write_rows(rows, args.json)
    if args.html:
        envs.beside("viewer.py").write_html(rows, vars(as_run), PANEL_SEED, args.html)
        print(f"wrote {args.html}")
    print_table(rows)


if __name__ == "__main__":
    envs.run_main(main)
