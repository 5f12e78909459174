"""Teacher data: optimal and perturbed trajectories, and the reflections on them (the paper's "negative examples").

A teacher that only ever saw good play cannot teach repair. So some trajectories are perturbed: at a random step the
agent takes a useless but not fatal action, and goes on from the worse state. The reflector learns to notice the
mistake, the policy to correct it: the label is always the EXPERT's action, never the perturbed one.

Deviation: the paper's teacher is GPT-4; ours are rules, one function an environment, so that the data is free,
reproducible and right. An environment of your own brings its teacher as a method `reflection(mistake)`.

    python negatives.py --env taxi         # write a data set and show it
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import envs
from envs import UserError
from reflect_rl import (
    ACTION_HEADER,
    add_common_options,
    env_factory,
    parse_args,
    policy_prompt,
    reflector_prompt,
    short_name,
    write_atomically,
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One step of teacher data, a line of the JSONL file. `action` indexes the expert's choice in `actions`."""

    trajectory: int  # number of the trajectory in its data set
    negative: bool  # whether that trajectory is perturbed
    mistake: bool  # whether the action that led to this state was the perturbation
    state: str
    reflection: str
    actions: list
    action: int


# ---------------------------------------------------------------------------------------------------------
# Teachers


def reflect_on_taxi(env, mistake):
    """Where things are, what is in the way, what the last action spoiled, the next sub-goal; not the move itself."""
    row, col, passenger, _ = envs.taxi_decode(env.taxi_state)
    aboard = passenger == envs.ON_BOARD
    name, (to_row, to_col) = "destination" if aboard else "passenger", env.target()
    return (
        f"The taxi is at row {row} column {col}. Blocked: {', '.join(env.blocked()) or 'nothing'}. "
        f"Passenger {'on board' if aboard else 'waiting'}. "
        f"Next goal: the {name} at row {to_row} column {to_col}, {envs.taxi_offset(row, col, to_row, to_col)}."
        + (f" To {env.last} was a mistake." if mistake else "")  # last: it follows from what comes before
    )


GOALS = {
    "down": "Next: go down.",
    "up": "Next: go up.",
    "read": "Next: read a file here.",
    "identify": "Next: identify it.",
    "page": "Next: turn the page.",
}


def reflect_on_exploration(env, mistake=False):
    """What the question is about, what the last move brought, what fits here, and the next sub-goal.

    `mistake`: whether the last move was not the expert's. What is seen is said in the very sentences of `describe`,
    which the base LM can finish already.
    """
    verb, name = env.moves[env.expert_action()]
    facts = [beginning + rest for beginning, rest in env.describe()]

    def said(beginning):
        return [fact for fact in facts if fact.startswith(beginning)]

    parts = [*said("The question has"), *reflect_on_last_move(env, said, mistake)]
    if verb != "id":
        names = [name for name in env.names_here()[0] if name.endswith("/")]
        verdicts = [said(f"The name {name} has")[0] for name in names]
        parts += [v for v in verdicts if len(verdicts) <= 6 or "no word" not in v]
        parts += said("On the way")
    elif env.last != ("cat", name):
        parts.append(f"{envs.show_name(name)} has it.")
    if (verb, name) == ("cd", ".."):
        parts.append("It is not here.")
    return " ".join([*parts, GOALS[sub_goal(verb, name)]])


def sub_goal(verb, name):
    if verb == "cd":
        return "up" if name == ".." else "down"
    return {"cat": "read", "id": "identify", "more": "page"}[verb]


def reflect_on_last_move(env, said, mistake):
    """Where each word of the question was found, if a file was read; whether the move was a mistake."""
    verb, name = env.last
    if verb == "cat":
        wrong = [] if env.cwd + (name,) in env.targets else ["Mistake: that is the wrong file."]
        return [*(said(f"{word} is in")[0] for word in env.asked()), *wrong]
    if not mistake:
        return []
    if verb == "more":
        return ["Mistake: it was on another page."]
    return ["Mistake: it was further down." if name == ".." else f"Mistake: {envs.show_name(name)}/ is the wrong way."]


def useless(env):
    """Whether the state itself shows that the last action brought nothing; never true after the expert's own action."""
    notes, (goal_verb, thing, place) = env.notes, env.subgoal()
    verb, *_ = notes.command.split()
    here = envs.kind(notes.here) if notes.here else None
    if verb == "take":
        return goal_verb == "drop" or (goal_verb == "place" and notes.origin == place)
    if verb == "move":
        moved = " ".join(notes.command.split()[1:3])
        return envs.kind(moved) == env.goal["object"] and not (here == env.goal["target"] and env.ready(moved))
    if verb in envs.STATIONS:
        return verb != envs.treatment(env.goal["type"])
    if verb in ("go", "open") and place:
        return not notes.command.endswith(f" {place}")
    if verb == "go":  # an unlikely place, where a likely one was still to be searched
        likely = envs.homes_of(thing)
        return here not in likely and any(envs.kind(other) in likely for other in notes.unsearched())
    if verb == "examine":  # another place than here can be examined where two are side by side: that is a search
        return notes.command.removeprefix("examine ") in (notes.here, notes.hand)
    return verb in ("look", "inventory", "close", "use") and not env.success


def whereabouts(env):
    """What is known of the object that the task is about."""
    notes, name = env.notes, env.goal["object"]
    if notes.hand and envs.kind(notes.hand) == name:
        return f"In hand is {notes.title(notes.hand)}."
    places = notes.where(name)
    placed = [thing for thing, place in places.items() if envs.kind(place) == env.goal["target"] and env.ready(thing)]
    known = [f"{notes.title(thing)} is in {place}." for thing, place in places.items() if thing not in placed]
    return " ".join([f"{thing} is placed." for thing in placed[:1]] + known[:1]) or f"No {name} was seen."


def errand(env):
    """The next sub-goal in words; where something is to be found, the two best places to look for it."""
    verb, thing, place = env.subgoal()
    if verb == "find":
        homes, here = envs.homes_of(thing), env.notes.here
        left = [
            other for other in envs.likely(thing, env.notes.unsearched()) if other == here or envs.kind(other) in homes
        ]
        hints = sorted(left, key=lambda other: other != here)[:2]  # a closed one in front of us first
        return f"find the {thing}, perhaps in {' or '.join(hints)}" if hints else f"find the {thing} in another place"
    if verb in envs.STATIONS:
        return f"{verb} {thing} at {place}"
    return {
        "take": f"get {thing} from {place}",
        "drop": f"put down {thing}",
        "use": f"light {thing} in {place}",
        "place": f"bring {thing} to {place}",
    }[verb]


def reflect_on_household(env, mistake):
    """Where am I, was the last action of use, what do I know, what is to be done; in sentences of `describe`."""
    notes = env.notes
    here = f"You are at {notes.here or 'the middle of the room'}."
    shut = f" {notes.here} is closed." if notes.here in notes.shut else ""
    wrong = f"To {notes.command.split()[0]} was of no use. " if mistake and useless(env) else ""
    target = f"The {'lamp is a' if env.goal['type'].startswith('look') else 'target is the'} {env.goal['target']}."
    return f"{wrong}{here}{shut} {target} {whereabouts(env)} Next goal: {errand(env)}."


TEACHERS = {
    envs.DangerousTaxi: reflect_on_taxi,
    envs.AutoExplore: reflect_on_exploration,
    envs.ALFWorld: reflect_on_household,
}


def teacher_of(env):
    """The teacher of an environment: `teacher(env, mistake) -> reflection` on its current state."""
    for cls, teacher in TEACHERS.items():
        if isinstance(env, cls):
            return teacher
    if hasattr(env, "reflection"):
        return lambda env, mistake: env.reflection(mistake)
    raise UserError(
        f"{type(env).__name__} has no teacher: give it a method reflection(mistake), or records with --data"
    )


# ---------------------------------------------------------------------------------------------------------
# Trajectories


def replay(env, options, actions, seed):
    """Reset and repeat `actions`: environments are deterministic given their seed, so this is how to look ahead."""
    state, info = env.reset(seed=seed, options=options)
    terminated = truncated = False
    for action in actions:
        state, _, terminated, truncated, info = env.step(action)
    return state, info, terminated or truncated


def draw_task(env, split, rng):
    """A random task of a split; for training an environment may have more than it lists (`training_task`)."""
    if split == "train" and hasattr(env, "training_task"):
        return env.training_task(rng)
    tasks = env.tasks(split)
    if not tasks:
        raise UserError(f"{type(env).__name__} has no tasks in its {split} split")
    return rng.choice(tasks)


def expert_steps(env, over):
    """Steps that the expert still needs from here, None if it does not get there; leaves the environment at its end."""
    steps, success = 0, False
    while not over:
        _, _, terminated, truncated, info = env.step(env.expert_action())
        steps, success, over = steps + 1, info["success"], terminated or truncated
    return steps if success else None


def perturbation(env, options, history, seed, rng):
    """An action that neither ends the episode nor brings the expert nearer to its goal; None if there is none.

    Found by playing every action to its end with the expert, or by asking the environment, if it has `mistakes()`.
    """
    _, info, _ = replay(env, options, history, seed)
    if hasattr(env, "mistakes"):
        return rng.choice(env.mistakes() or [None])
    here, candidates = expert_steps(env, False), list(range(len(info["actions"])))
    rng.shuffle(candidates)
    for action in candidates:
        _, _, over = replay(env, options, [*history, action], seed)
        left = None if over else expert_steps(env, over)
        if left is not None and left >= here:
            return action
    return None


def trajectory(env, options, number, negative, seed):
    """One expert trajectory as `Record`s; a negative one has a mistake at a random step, and about two more anywhere.

    Three and not one, since a mistake is otherwise one step in thirty: a reflector that never spoke of mistakes was
    right on 97% of the held-out states. Anywhere: also where the mistakes themselves have led, and at the goal. When
    all three steps were drawn beforehand, one state in a hundred of AutoExplore had read a wrong file beside the right
    one, and there the policy named that file as the answer two times in three.
    """
    rng, teacher = random.Random(seed), teacher_of(env)
    history, records, mistake = [], [], False
    state, info = env.reset(seed=seed, options=options)
    length = expert_steps(env, False)
    if length is None:
        raise UserError(f"the expert does not finish {str(options['task'])[:80]} within its horizon: nothing to teach")
    certain, share = (rng.randrange(length), min(0.4, 2 / length)) if negative else (None, 0.0)
    while True:
        state, info, over = replay(env, options, history, seed)
        if over:
            return records
        action = env.expert_action()
        records.append(Record(number, negative, mistake, state, teacher(env, mistake), list(info["actions"]), action))
        wrong = len(history) == certain or rng.random() < share
        detour = perturbation(env, options, history, seed, rng) if wrong else None
        mistake = detour is not None
        history.append(detour if mistake else action)


def make_records(make_env, trajectories, negatives, seed, split="train"):
    """`trajectories` expert trajectories on random tasks of a split, a share `negatives` of them perturbed."""
    env, rng, records = make_env(), random.Random(seed), []
    count = round(trajectories * negatives)
    for number in range(trajectories):
        options = {**getattr(env, "training", {}), "task": draw_task(env, split, rng)}
        records += trajectory(env, options, number, number < count, rng.getrandbits(32))
    return records


def write_records(records, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def write_tasks(tasks, path):
    """Tasks as JSON lines (ASCII, so that file names of any bytes survive), to be mended by hand or by a large model
    and played with `AutoExplore(questions=path)`."""
    write_atomically(path, "".join(json.dumps(task) + "\n" for task in tasks))


def checked_record(record):
    """The record, if its fields are what they should be; a file may come from anywhere."""
    if not isinstance(record.state, str) or not isinstance(record.reflection, str):
        raise ValueError("state and reflection must be texts")
    if not isinstance(record.actions, list) or not all(isinstance(action, str) for action in record.actions):
        raise ValueError("actions must be a list of texts")
    if not isinstance(record.action, int) or not 0 <= record.action < len(record.actions):
        raise ValueError(f"action must be an index of the {len(record.actions)} actions, not {record.action!r}")
    return record


def read_records(path):
    """The records of a JSONL file; a malformed line is named by its number."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the data set {path}: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = checked_record(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        records.append(record)
    if not records:
        raise UserError(f"the data set {path} is empty")
    return records


def hold_out(records):
    """`{"train": ..., "valid": ...}`: every sixth trajectory is held out; of fewer, all are in both."""
    held = set(sorted({record.trajectory for record in records})[5::6])
    kept = [record for record in records if record.trajectory not in held]
    return {"train": kept, "valid": [record for record in records if record.trajectory in held] or kept}


# ---------------------------------------------------------------------------------------------------------
# SFT examples and the base LM's corpus: (prompt, completion) texts


def sft_examples(records, form, labels):
    """Records as `(prompt, completion)` for `reflect`, `policy` (with reflection) or `plain` (without).

    `labels`: see `reflect_rl.Labels`.
    """
    if form == "reflect":
        return [(reflector_prompt(record.state), record.reflection) for record in records]
    examples = []
    for record in records:
        names, _ = labels(record.actions)
        reflection = record.reflection if form == "policy" else None
        examples.append((policy_prompt(record.state, reflection, record.actions, names), names[record.action]))
    return examples


def random_walk(env, rng, length):
    """Random play of at most `length` steps that does not end: `(state, info)`; the environment stays there."""
    options = {**getattr(env, "training", {}), "task": draw_task(env, "train", rng)}
    if getattr(env, "modes", None):
        options["mode"] = rng.choice(env.modes)
    seed, history = rng.getrandbits(32), []
    state, info, _ = replay(env, options, history, seed)
    for _ in range(length):
        action = rng.randrange(len(info["actions"]))
        state, _, terminated, truncated, info = env.step(action)
        if not (terminated or truncated):
            history.append(action)
        else:
            state, info, _ = replay(env, options, history, seed)
    if hasattr(env, "ask_here") and rng.random() < 0.8:
        env.ask_here(rng)
        state, info = env.render(), env.info()
    return state, info


FACTS_HEADER = "# Facts:\n"


def corpus_document(make_env, rng, labels):
    """One document for the base LM: a state met in RANDOM play, plain facts about it, a random action, what it led to.

    No expert action and no reflection, so that what SFT and RL add is theirs. The menu is shuffled: a label means its
    line and nothing else. Mostly the random action is named among the facts, or its verb alone, which teaches to find
    its label, or one of those that will do. Half of the time the facts are in order, which teaches to go through a
    listing, else each has to be found by itself.
    `labels`: see `reflect_rl.Labels`.
    """
    env = make_env()
    state, info = random_walk(env, rng, rng.randrange(20))
    sentences = [beginning + rest for beginning, rest in env.describe()]
    sentences += rng.sample(getattr(env, "rules", ()), min(1, len(getattr(env, "rules", ()))))
    menu = rng.sample(range(len(info["actions"])), len(info["actions"]))
    pick = rng.randrange(len(menu))
    action, named = info["actions"][menu[pick]], rng.random()
    if named < 0.75:
        sentences.append(f"Now: {action if named < 0.5 else action.split()[0]}.")
    if rng.random() < 0.5:
        rng.shuffle(sentences)
    actions = [info["actions"][i] for i in menu]
    names, _ = labels(actions)
    prompt = policy_prompt(f"{state}\n{FACTS_HEADER}{' '.join(sentences)}", None, actions, names)
    after, *_ = env.step(menu[pick])
    return f"{prompt}{names[pick]}\n{after.splitlines()[-1]}"


# ---------------------------------------------------------------------------------------------------------


def add_data_options(parser):
    group = parser.add_argument_group("teacher data")
    group.add_argument("--trajectories", type=int, default=200, help="teacher trajectories (default: 200)")
    group.add_argument("--negatives", type=float, default=0.5, help="share of them that is perturbed (default: 0.5)")
    group.add_argument(
        "--no-negatives", dest="negatives", action="store_const", const=0.0, help="ablation: no perturbed trajectories"
    )
    return group


def check_data_options(args):
    if not 0 <= args.negatives <= 1:
        raise UserError(f"--negatives is a share from 0 to 1, not {args.negatives}")


def main():
    parser = argparse.ArgumentParser(description="Write a teacher data set and show it.", allow_abbrev=False)
    add_common_options(parser)
    add_data_options(parser)
    parser.add_argument("--split", default="train", help="split of the tasks (default: train)")
    parser.add_argument("--out", help="JSONL file to write (default: RUNS/ENV-data.jsonl)")
    parser.add_argument("--tasks", metavar="FILE", help="write the tasks of the split as JSON lines instead")
    args = parse_args(parser)
    check_data_options(args)
    if args.tasks:
        tasks = env_factory(args)().tasks(args.split)
        write_tasks(tasks, args.tasks)
        return print(f"{args.tasks}: {len(tasks)} tasks of the {args.split} split")
    records = make_records(env_factory(args), args.trajectories, args.negatives, args.seed, args.split)
    out = args.out or f"{args.runs}/{short_name(args.env)}-data.jsonl"
    write_records(records, out)
    shown = next((r.trajectory for r in records if r.mistake), 0)
    for record in (r for r in records if r.trajectory == shown):
        print(f"{record.state}\n# Analyze:\n{record.reflection}\n{ACTION_HEADER}{record.actions[record.action]}\n")
    negatives = len({r.trajectory for r in records if r.negative})
    print(
        f"{out}: {len(records)} steps of {args.trajectories} trajectories, "
        f"{args.trajectories - negatives} positive and {negatives} negative; "
        f"{sum(r.mistake for r in records)} steps follow a mistake"
    )


if __name__ == "__main__":
    envs.run_main(main)
