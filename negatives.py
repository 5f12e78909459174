"""Teacher data: optimal and perturbed trajectories, and the reflections on them (the paper's "negative examples").

A teacher that only ever saw good play cannot teach repair. So some trajectories are perturbed: at a random step the
agent takes a useless but not fatal action, and goes on from the worse state. The reflector learns to notice the
mistake, the policy to correct it: the label is always the EXPERT's action, never the perturbed one.

Deviation: the paper's teacher is GPT-4; ours are rules, one function an environment, so that the data is free,
reproducible and right. An environment of your own brings its teacher as a method `reflection(mistake)`.

    python negatives.py --env taxi         # write a data set and show a trajectory with a mistake
"""

import argparse
import dataclasses
import functools
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import envs
from envs import UserError
from reflect_rl import (
    ACTION_HEADER, COMMON, add_options, env_factory, one_line, parse_args, reflector_prompt,
    short_name, write,
)

OPTIONS = {
    "trajectories": (200, "teacher trajectories", 1),
    "negatives": (0.5, "share of them that has mistakes, from 0 to 1", 0.0),
    "no_negatives": (False, "ablation: no mistakes, a share of 0"),
}
EXTRA_MISTAKES = 2  # in a negative trajectory, on average, beside the certain one
MOST_FAILURES = 20  # tasks in a row that the expert may fail on before the data set is given up


@dataclasses.dataclass(frozen=True)
class Record:
    """One step of teacher data, a line of the JSONL file. `action` indexes the expert's choice in `actions`."""

    trajectory: int  # number of the trajectory in its data set
    negative: bool  # whether that trajectory is perturbed
    mistake: bool  # whether the action that led to this state was the perturbation
    state: str
    reflection: str
    actions: tuple
    action: int

    def __post_init__(self):
        """A `UserError` where a field is not what it should be: a file or an environment may come from anywhere."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # True is an int to Python, and would quietly mean the second action
            if not isinstance(value, field.type) or (field.type is int and isinstance(value, bool)):
                raise UserError(f"{field.name} must be of type {field.type.__name__}, not {str(value)[:80]!r}")
        try:  # half of a surrogate pair is a str to Python, and no text to a tokenizer
            "".join((self.state, self.reflection, *self.actions)).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(f"state, reflection and actions must be Unicode texts: {error}") from None
        if not 0 <= self.action < len(self.actions):
            raise UserError(f"action must be an index of the {len(self.actions)} actions, not {self.action}")


# ---------------------------------------------------------------------------------------------------------
# Words, as AutoExplore's questions and names are compared. The makers of its data use the same.

# These say nothing about what a file is about.
STOP = """
    a about after all also among an and any are as at be been before but by can code defines described do does each
    every explains file for from gives had has have how if in into is it its just kept may more most must never no
    not of off on one only or other our out over per read say says set sets settings should so some than that the
    their them then there these they this those through to too two under up use used uses was were what when where
    which while who will with without you your table"""
STOP = frozenset(STOP.split())


def spelt_words_of(text):
    """The words of a text that carry meaning, as spelt and in order; `snake_case` and `camelCase` are split."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.findall(r"[^\W\d_]{3,}", text) if word.lower() not in STOP]


def words_of(text):
    """The same in lower case: what is compared."""
    return [word.lower() for word in spelt_words_of(text)]


@functools.lru_cache(maxsize=100_000)
def stem(word):
    """What words of one family share: roast of `roasts`, `roasted`, `roaster`, `roasting`."""
    word = re.sub(r"(?<=...)(ings?|ers?|ies|y|ed|es|s|e)$", "", word)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word  # shipp(ing) is ship


def stems_of(text):
    return {stem(word) for word in words_of(text)}


# ---------------------------------------------------------------------------------------------------------
# Sentences about AutoExplore. The teacher says what it sees in the very sentences of the base LM's corpus
# (models/nano/make.py), which the base can finish already: other words would have to be learned first.


def asked(env):
    """The words of the question, as they are spelt there."""
    return list(dict.fromkeys(spelt_words_of(env.question)))


def matches(env, text):
    """The words of the question that a text has too, in the question's order and spelling."""
    stems = stems_of(text)
    return [word for word in asked(env) if stem(word.lower()) in stems]


def say_question(env):
    return f"The question has the words {', '.join(asked(env))}."


def say_name(env, place, name):
    """What a name has of the question; `place` is "The name" (of something here) or "On the way"."""
    return f"{place} {name} has {', '.join(matches(env, name)) or 'no word'}."


def say_way(env):
    return [say_name(env, "On the way", f"{name}/") for name in env.cwd]


def say_file(env):
    """Where each word of the question was found: in the file just read, or else in its path."""
    in_file, in_path = matches(env, env.result), matches(env, " ".join(env.cwd))
    sentences = []
    for word in asked(env):
        place = "the file" if word in in_file else "the path" if word in in_path else "neither"
        sentences.append(f"{word} is in {place}.")
    return sentences


# ---------------------------------------------------------------------------------------------------------
# Teachers


def reflect_on_taxi(env, mistake):
    """Where things are, what is in the way, what the last action spoiled, the next sub-goal; not the move itself."""
    row, col, passenger, _ = envs.taxi_decode(env.taxi_state)
    aboard = passenger == envs.ON_BOARD  # then the next goal is the destination
    name, (to_row, to_col) = "destination" if aboard else "passenger", env.target()
    text = (
        f"The taxi is at row {row} column {col}. Blocked: {', '.join(env.blocked()) or 'nothing'}. "
        f"Passenger {'on board' if aboard else 'waiting'}. "
        f"Next goal: the {name} at row {to_row} column {to_col}, {envs.taxi_offset(row, col, to_row, to_col)}."
    )
    # The mistake comes last: whether it was one follows from the sentences before it.
    return text + f" To {env.last} was a mistake." if mistake else text


def reflect_on_exploration(env, mistake):
    """What the question is about, what the last move brought, what fits here, and the next sub-goal."""
    verb, name = env.moves[env.expert_action()]
    parts = [say_question(env), *say_last_move(env, mistake)]
    if verb != "id":
        directories = [name for name in env.names_here()[0] if name.endswith("/")]
        verdicts = [say_name(env, "The name", name) for name in directories]
        if len(verdicts) > 6:  # too long for a reflection: leave out those that do not fit
            verdicts = [verdict for verdict in verdicts if "no word" not in verdict]
        parts += verdicts + say_way(env)
    elif env.last != ("cat", name):  # the answer was read a while ago, and its text is not in the state any more
        parts.append(f"{name} has it.")
    if (verb, name) == ("cd", ".."):
        parts.append("It is not here.")
    if verb == "cd":
        goal = "go up" if name == ".." else "go down"
    else:
        goal = {"cat": "read a file here", "id": "identify it", "more": "turn the page"}[verb]
    return " ".join([*parts, f"Next: {goal}."])


def say_last_move(env, mistake):
    """Where each word of the question was found, if a file was read; whether the move was a mistake."""
    verb, name = env.last
    if verb == "cat":
        wrong = [] if env.cwd + (name,) in env.targets else ["Mistake: that is the wrong file."]
        return say_file(env) + wrong
    if not mistake:
        return []
    if verb == "more":
        return ["Mistake: it was on another page."]
    return ["Mistake: it was further down." if name == ".." else f"Mistake: {name}/ is the wrong way."]


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
    if verb == "go":  # to an unlikely place, although a likely one was still to be searched
        likely = envs.homes_of(thing)
        return here not in likely and any(envs.kind(other) in likely for other in notes.unsearched())
    if verb == "examine":  # of two places side by side the other one can be examined: that is a search
        return notes.command.removeprefix("examine ") in (notes.here, notes.hand)
    return verb in ("look", "inventory", "close", "use") and not env.success


def whereabouts(env):
    """What is known of the object that the task is about."""
    notes, name = env.notes, env.goal["object"]
    if notes.hand and envs.kind(notes.hand) == name:
        return f"In hand is {notes.title(notes.hand)}."
    placed, known = [], []
    for thing, place in notes.where(name).items():
        if envs.kind(place) == env.goal["target"] and env.ready(thing):
            placed.append(f"{thing} is placed.")
        else:
            known.append(f"{notes.title(thing)} is in {place}.")
    return " ".join(placed[:1] + known[:1]) or f"No {name} was seen."


def errand(env):
    """The next sub-goal in words; of something that is to be found, the two best places to look for it."""
    verb, thing, place = env.subgoal()
    if verb == "find":
        homes, here = envs.homes_of(thing), env.notes.here
        likely = envs.likely(thing, env.notes.unsearched())
        left = [other for other in likely if other == here or envs.kind(other) in homes]
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
    """Where am I, was the last action of use, what do I know, what is to be done."""
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


def reflection_of(env, mistake):
    """The teacher's words on the current state, one line. A class's own method comes before a built-in teacher."""
    teacher = type(env).reflection  # of `Env` itself: a UserError that names the class and the method
    for cls, built_in in TEACHERS.items():
        if isinstance(env, cls) and not env.has("reflection"):
            teacher = built_in
    text = teacher(env, mistake)
    if not isinstance(text, str):
        raise UserError(f"{type(env).__name__}.reflection must return a text, not {text!r}")
    return one_line(text)


# ---------------------------------------------------------------------------------------------------------
# Trajectories


class Situation(NamedTuple):
    """What an environment last returned, copied at once: it may reuse one `info` dict or list."""

    state: str
    actions: tuple
    success: bool
    over: bool


def take(env, action):
    state, _, terminated, truncated, info = env.step(action)
    return Situation(state, tuple(info["actions"]), bool(info["success"]), bool(terminated or truncated))


def begin(env, options, seed, actions=()):
    """Reset, and repeat `actions`. Environments are deterministic given their seed, so this is how to go back."""
    state, info = env.reset(seed=seed, options=options)
    now = Situation(state, tuple(info["actions"]), bool(info["success"]), False)
    for action in actions:
        now = take(env, action)
    return now


def expert_steps(env, now):
    """Steps that the expert still needs, None if it does not get there; leaves the environment at its end."""
    steps = 0
    while not now.over:
        now = take(env, env.expert_action())
        steps += 1
    return steps if now.success else None


def perturbation(env, options, history, seed, rng):
    """An action that neither ends the episode nor brings the expert nearer to its goal; None if there is none.

    It is one of `env.mistakes()`; if the environment does not know them, each action is tried and the expert plays
    on to the end. The environment stays where it was.
    """
    known = env.mistakes()
    if known is not None:
        return rng.choice(known) if known else None
    now = begin(env, options, seed, history)
    candidates = list(range(len(now.actions)))
    rng.shuffle(candidates)
    here, found = expert_steps(env, now), None
    for action in candidates:
        now = begin(env, options, seed, [*history, action])
        left = None if now.over else expert_steps(env, now)
        if left is not None and left >= here:  # still winnable, and no nearer
            found = action
            break
    begin(env, options, seed, history)
    return found


def trajectory(env, options, number, negative, seed):
    """One expert trajectory as `Record`s; None if the expert does not reach the goal.

    A negative one has a mistake at a random step, and about two more anywhere: also after a mistake, also at the goal.
    With a single one the reflector learned to call nothing a mistake, and hardly any state had read a wrong file and
    the right one, so that the policy could not tell them apart.
    """
    rng = random.Random(seed)
    # First the expert alone: does it get there, and in how many steps?
    length = expert_steps(env, begin(env, options, seed))
    if length is None:
        return None
    certain, share = None, 0.0
    if negative:  # one step that is surely perturbed, and a share of all steps
        certain, share = rng.randrange(length), min(0.4, EXTRA_MISTAKES / length)
    history, records, mistake = [], [], False
    now = begin(env, options, seed)
    while not now.over:
        action = int(env.expert_action())
        reflection = reflection_of(env, mistake)
        # The label is the expert's action, whatever is done next.
        records.append(Record(number, negative, mistake, now.state, reflection, now.actions, action))
        wrong = len(history) == certain or rng.random() < share
        detour = perturbation(env, options, history, seed, rng) if wrong else None
        mistake = detour is not None
        history.append(detour if mistake else action)
        now = take(env, history[-1])
    return records


def make_records(make_env, trajectories, negatives, seed, split="train"):
    """`trajectories` expert trajectories on random tasks of a split, a share `negatives` of them perturbed.

    Returns `(records, failed)`: a task on which the expert fails is drawn again, and counted.
    """
    if not 0 <= negatives <= 1:
        raise UserError(f"--negatives is a share from 0 to 1, not {negatives}")
    env, rng = make_env(), random.Random(seed)
    tasks = env.tasks(split)
    if not tasks:
        raise UserError(f"{type(env).__name__} has no tasks in its {split} split")
    records, number, failed, in_a_row = [], 0, 0, 0
    perturbed = round(trajectories * negatives)  # the first ones: an exact share
    while number < trajectories:
        options = {**env.training, "task": rng.choice(tasks)}
        found = trajectory(env, options, number, number < perturbed, rng.getrandbits(32))
        if found is None:
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row == MOST_FAILURES:
                name, task = type(env).__name__, str(options["task"])[:80]
                raise UserError(f"the expert of {name} failed on {in_a_row} tasks in a row, the last one {task}")
            continue
        records += found
        number, in_a_row = number + 1, 0
    return records, failed


# ---------------------------------------------------------------------------------------------------------
# Data sets


def write_records(records, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def read_record(line):
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise UserError("a record must be a JSON object")
    if isinstance(fields.get("actions"), list):  # JSON has no tuples
        fields["actions"] = tuple(fields["actions"])
    record = Record(**fields)
    return dataclasses.replace(record, reflection=one_line(record.reflection))


def read_records(path):
    """The records of a JSONL file; a malformed line is named by its number."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    if not text.strip():
        raise UserError(f"the data set {path} is empty")
    records = []
    # Not splitlines(): it also breaks at U+2028 and U+0085, which may stand inside a JSON text.
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        try:
            records.append(read_record(line))
        except (UserError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def hold_out(records):
    """`{"train": ..., "valid": ...}`: every sixth trajectory is held out; of fewer, all are in both."""
    # Whole trajectories: the states of one are alike.
    held = set(sorted({record.trajectory for record in records})[5::6])
    train = [record for record in records if record.trajectory not in held]
    valid = [record for record in records if record.trajectory in held]
    return {"train": train, "valid": valid or train}


def teacher_data(folder, make_env, args):
    """`{"train": records, "valid": records}` of the teacher, written to `folder` where they are not there yet."""
    data = {}
    for split, count in (("train", args.trajectories), ("valid", max(10, args.trajectories // 5))):
        path = Path(folder) / f"{split}.jsonl"
        if not path.exists():
            records, failed = make_records(make_env, count, args.negatives, args.seed, split)
            if failed:
                print(f"{path}: the expert failed on {failed} tasks; others were drawn instead")
            write_records(records, path)
        data[split] = read_records(path)
    return data


def main():
    parser = argparse.ArgumentParser(description="Write a teacher data set and show it.", allow_abbrev=False)
    own = {"split": ("train", "split of the tasks"), "out": ("", "JSONL file to write; RUNS/ENV-data.jsonl if empty")}
    add_options(parser, COMMON, OPTIONS, own)
    args = parse_args(parser)
    records, failed = make_records(env_factory(args), args.trajectories, args.negatives, args.seed, args.split)
    out = args.out or f"{args.runs}/{short_name(args.env)}-data.jsonl"
    write_records(records, out)
    # Show one whole trajectory, with a mistake if there is one.
    mistakes = [record for record in records if record.mistake]
    shown = mistakes[0].trajectory if mistakes else 0
    for record in records:
        if record.trajectory == shown:
            action = record.actions[record.action]
            print(f"{reflector_prompt(record.state)}{record.reflection}\n{ACTION_HEADER}{action}\n")
    print(f"{out}: {len(records)} steps of {args.trajectories} trajectories, {len(mistakes)} of them behind a mistake")
    if failed:
        print(f"the expert failed on {failed} tasks; others were drawn instead")


if __name__ == "__main__":
    envs.run_main(main)
