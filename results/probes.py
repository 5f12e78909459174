"""Three questions that need no further training, or little: does the text matter, is enumeration cheap, do negatives
help?

    text      the runs of `study.py reflection`, played with other texts than the reflector's own
    scoring   one token an action against the log-probabilities of whole action texts (as SayCan and GLAM score)
    recovery  AutoExplore: a reflector that saw mistakes and one that did not, after a forced wrong `cat`

    python results/probes.py text --env taxi --seeds 0,1,2,3,4      # after study.py, with the same --runs
    python results/probes.py text --env taxi --draw                 # the table from the file
"""

import argparse
import json
import pathlib
import random
import sys
import time

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import envs  # noqa: E402
import eval as evaluation  # noqa: E402
import negatives  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
import study  # noqa: E402
from plumbing.options import env_factory  # noqa: E402
from plumbing.rows import write_rows  # noqa: E402
from plumbing.runs import adapters_of, budget_of  # noqa: E402
from reflect_rl import (  # noqa: E402
    adapter_parameters, add_adapter, encode_all, forward, load_players, reflector_prompt, use_adapter,
)

# ---------------------------------------------------------------------------------------------------------
# Text: who writes what the policy reads


class OtherText:
    """An actor: the policy reads texts of another origin than the reflector's on the state.

    `shuffled`: what the reflector wrote on another state of the panel; `empty`: a dash for every word of its own text;
    `teacher`: the teacher's own, the ceiling of any reflector.
    """

    def __init__(self, players, kind, pool=()):
        self.players, self.kind, self.pool = players, kind, sorted(pool)
        self.expected = {}  # id of an episode -> the expert's action, to know afterwards whether a mistake was made

    def texts(self, episodes):
        if self.kind == "teacher":
            return list(map(self.taught, episodes))
        found = []
        for episode, own in zip(episodes, self.players.reflect([e.state for e in episodes]), strict=True):
            if self.kind == "shuffled":
                own = random.Random(episode.state).choice([text for text in self.pool if text != own])
            found.append(own if self.kind == "shuffled" else " ".join("-" for _ in own.split()))
        return found

    def taught(self, episode):
        wanted = self.expected.get(id(episode))
        mistake = bool(episode.steps) and episode.steps[-1].action != wanted
        self.expected[id(episode)] = episode.env.expert_action()
        return negatives.reflection_of(episode.env, mistake)

    def __call__(self, episodes, known):
        menus = [episode.actions for episode in episodes]
        steps = self.players.steps([episode.state for episode in episodes], menus, self.texts(episodes))
        self.players.score(steps)
        return steps


def text_rows(args):
    """Rows of one seed: after SFT and after RL, each with its own, shuffled, empty and the teacher's texts."""
    rows = []
    for title, folder in (("SFT", sft.folder_of(args)), ("SFT + RL", pathlib.Path(args.runs) / rl.run_name(args))):
        players = load_players(args, adapters_of(folder))
        own = evaluation.evaluate(players, env_factory(args), args.split, args.repeats)
        pool = {step.reflection for episode in own for step in episode.steps}
        rows.append(played_row(f"{title}, the reflector's text", own, args, adapters_of(folder)))
        for kind in ("shuffled", "empty", "teacher"):
            episodes = evaluation.evaluate(OtherText(players, kind, pool), env_factory(args), args.split, args.repeats)
            rows.append(played_row(f"{title}, {kind} text", episodes, args, adapters_of(folder)))
    return rows


def played_row(title, episodes, args, adapters, **more):
    """A row of the table of sampled episodes that are there already."""
    budget = [evaluation.budget_of(adapters.values())]
    row = {"name": f"{title}-s{args.seed}", "split": args.split, "env": env_factory(args)(), "budget": budget}
    return row | {"sampled": [episodes], "greedy": [[]]} | more


# ---------------------------------------------------------------------------------------------------------
# Scoring: one token an action, or all tokens of its text


class WholeTexts:
    """An actor: softmax over the log-probabilities of the actions' whole texts, which the prompt does not list."""

    def __init__(self, players):
        self.players, self.tokens, self.decisions, self.seconds = players, 0, 0, 0.0

    @torch.no_grad()
    def __call__(self, episodes, known):
        began, steps = time.perf_counter(), []
        states, menus = [e.state for e in episodes], [e.actions for e in episodes]
        for step in self.players.steps(states, menus):
            pairs = whole_texts(self.players, [(step.state, step.reflection, action) for action in step.actions])
            scores = []
            for start in range(0, len(pairs), self.players.micro_batch):
                scores += text_log_probs(self.players, pairs[start : start + self.players.micro_batch])
            step.log_probs = torch.tensor(scores).log_softmax(0).tolist()
            steps.append(step)
            self.tokens += sum(len(prompt) + len(completion) for prompt, completion in pairs)
        self.decisions += len(steps)
        self.seconds += time.perf_counter() - began
        return steps


class OneToken:
    """The players as they are, with the same counts."""

    def __init__(self, players):
        self.players, self.tokens, self.decisions, self.seconds = players, 0, 0, 0.0

    def __call__(self, episodes, known):
        began = time.perf_counter()
        steps = self.players.steps([e.state for e in episodes], [e.actions for e in episodes])
        self.players.score(steps)
        self.tokens += sum(len(step.ids) for step in steps)
        self.decisions += len(steps)
        self.seconds += time.perf_counter() - began
        return steps


def whole_texts(players, choices):
    """(prompt ids, completion ids) of (state, reflection, action text): no menu in the prompt, EOS behind the text."""
    pairs, tokenizer = [], players.tokenizer
    for state, reflection, action in choices:
        text = state if reflection is None else reflector_prompt(state) + reflection
        prompt, completion = f"{text}\n# Action:\n", encode_all(tokenizer, [action], bos=False)[0]
        pairs.append((encode_all(tokenizer, [prompt])[0], [*completion, tokenizer.eos_token_id]))
    return pairs


def text_log_probs(players, pairs):
    """The log-probability of each completion, a list of floats. (Its mean over tokens would flatten the softmax.)"""
    ids, mask = sft.collate(pairs, players.device)
    use_adapter(players.model, "policy")
    rows, places = mask[:, 1:].nonzero(as_tuple=True)  # (N,)
    log_probs = forward(players.model, ids, rows, places).logits.float().log_softmax(-1)  # (N, V)
    chosen = log_probs.gather(1, ids[rows, places + 1][:, None])[:, 0]
    return torch.zeros(len(ids), device=ids.device).index_add(0, rows, chosen).tolist()


def scoring_rows(args):
    """Rows of one seed: the policy of SFT, and one trained on whole texts with the same records and updates."""
    folder, rows = sft.folder_of(args), []
    players, adapters = load_players(args, adapters_of(folder)), adapters_of(folder)
    one = OneToken(players)
    episodes = evaluation.evaluate(one, env_factory(args), args.split, args.repeats)
    rows.append(played_row("one token an action", episodes, args, adapters, **cost(one)))

    updates = json.loads((folder / "policy" / "budget.json").read_text(encoding="utf-8"))["updates"]
    records = negatives.read_records(folder / "data" / "train.jsonl")
    players = load_players(args, {"reflect": folder / "reflect"})
    torch.manual_seed(args.seed)
    add_adapter(players.model, "policy", args.rank, args.alpha)
    pairs = whole_texts(players, [(r.state, r.reflection, r.actions[r.action]) for r in records])
    parameters = adapter_parameters(players.model, "policy")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = sft.lr_at(update, sft.MOST_UPDATES, args.lr)  # as SFT's `auto`
        use_adapter(players.model, "policy")
        sft.loss_of(sft.batch_at(pairs, update, args), players, backward=True)
        torch.nn.utils.clip_grad_norm_(parameters, sft.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
    whole = WholeTexts(players)
    episodes = evaluation.evaluate(whole, env_factory(args), args.split, args.repeats)
    rows.append(played_row("whole action texts", episodes, args, adapters, **cost(whole)))
    return rows


def cost(actor):
    """What a decision costs, the reflection included in the time and left out of the tokens."""
    return {"tokens": actor.tokens / actor.decisions, "seconds": actor.seconds / actor.decisions}


# ---------------------------------------------------------------------------------------------------------
# Recovery: reflectors and policies that saw mistakes in SFT, and some that did not, with as many records


class WrongFirst:
    """An actor: the expert leads to where it would read a file, a wrong one is read instead, then the players play."""

    def __init__(self, players):
        self.players, self.spoiled = players, set()  # ids of the episodes that had their wrong `cat`

    def __call__(self, episodes, known):
        steps = self.players(episodes, known)
        for episode, step in zip(episodes, steps, strict=True):
            if id(episode) in self.spoiled:
                continue
            expert = episode.env.expert_action()
            wrong = [i for i in episode.env.mistakes() if episode.actions[i].startswith("cat ")]
            if episode.actions[expert].startswith("cat ") and wrong:
                expert = random.Random(episode.state).choice(wrong)
                self.spoiled.add(id(episode))
            step.log_probs = [0.0 if i == expert else float("-inf") for i in range(len(episode.actions))]
        return steps


def fresh_repositories(path):
    """A file of 100 generated repositories with a question each, that are in no split."""
    prepare = envs.beside("autoexplore/prepare.py")
    trees, tasks = {}, []
    for seed in range(5000, 5100):
        name = f"generated:{seed}"
        trees[name] = prepare.generate_tree(seed)
        found = prepare.tasks_of_tree(trees[name], name, "fresh", random.Random(name), 1)
        tasks.append(random.Random(seed).choice([task for task in found if task["depth"]] or found))
    shown = {name: prepare.shown_tree(tree) for name, tree in trees.items()}
    prepare.write({"repos": shown, "tasks": {"train": [], "valid": [], "test": tasks}}, path)


def records_of(args, share, least):
    """A file of records, a share of the trajectories with mistakes: exactly `least` records, if that is given."""
    path = pathlib.Path(args.runs) / f"records-{share}-{args.trajectories}-s{args.seed}.jsonl"
    if not path.exists():
        trajectories = args.trajectories
        while True:
            records, _ = negatives.make_records(env_factory(args), trajectories, share, args.seed)
            if not least or len(records) >= least:
                break
            trajectories += 10
        # The trajectories with mistakes come first; mixed, every sixth that is held out is of both kinds.
        numbers = random.Random(args.seed).sample(range(trajectories), trajectories)
        records.sort(key=lambda record: numbers[record.trajectory])
        negatives.write_lines(path, records[: least or None])
    return path


def recovery_rows(args):
    """Rows of one seed: success on the fresh repositories, and after a forced mistake."""
    rows, least, fresh, updates = [], 0, pathlib.Path(args.runs).resolve() / "fresh.json", {}
    for title, share in (("with negatives", 0.75), ("without negatives", 0.0), ("without negatives, longer", 0.0)):
        path = records_of(args, share, least)
        least = least or len(negatives.read_records(path))
        own = study.arm(args, data=str(path), negatives=share)
        if title.endswith("longer"):  # each stage with as many updates as the same stage with negatives
            own.reflect_steps, own.policy_steps = updates["reflect"], updates["policy"]
            own.runs = f"{args.runs}/longer"
        sft.run(own, ["reflect", "policy"], schedule=sft.MOST_UPDATES)  # the learning rates are those of `auto`
        adapters = adapters_of(sft.folder_of(own))
        updates = updates or {name: budget_of([adapters[name]])["updates"] for name in adapters}
        players = load_players(own, adapters)
        own.env_option = [("repos", str(fresh))]
        for name, actor in (("", players), (", after a wrong file", WrongFirst(players))):
            episodes = evaluation.evaluate(actor, env_factory(own), "test", args.repeats)
            rows.append(played_row(title + name, episodes, own, adapters))
    return rows


PROBES = {"text": text_rows, "scoring": scoring_rows, "recovery": recovery_rows}


def main():
    parser = argparse.ArgumentParser(description="Text, scoring, recovery.")
    parser.add_argument("study", choices=PROBES)
    args, own, path = study.options_of(parser)
    fresh = pathlib.Path(args.runs).resolve() / "fresh.json"  # the panel of `recovery`, no split of the environment's
    if own.study == "recovery" and not fresh.exists():
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh_repositories(str(fresh))
    if not own.draw:
        rows = []
        for seed in own.seeds:
            rows += PROBES[own.study](study.arm(args, seed=seed))
        write_rows(rows, path)
    if own.study == "recovery":
        args.env_option = [("repos", str(fresh))]
    study.draw(path, env_factory(args)())


if __name__ == "__main__":
    envs.run_main(main)
