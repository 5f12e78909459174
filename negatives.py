"""Teacher data: optimal and perturbed trajectories, and the reflections on them (the paper's "negative examples").

A teacher that only ever saw good play cannot teach repair. So some trajectories are perturbed: at a random step the
agent takes a useless but not fatal action, and goes on from the worse state. The reflector learns to notice the
mistake, the policy to correct it: the label is always the EXPERT's action, never the perturbed one.

Deviation: the paper's teacher is GPT-4; ours are rules, one function an environment, so that the data is free,
reproducible and right. An environment of your own brings its teacher as a method `reflection(mistake)`.
`--teacher openai` asks a chat model for the words instead (models/endpoint.py).

    python negatives.py --env taxi         # write a data set and show a trajectory with a mistake
"""

import argparse
import dataclasses
import random
from pathlib import Path

import envs
from envs import UserError
from plumbing.jsonl import check_types, read_lines, write_lines
from plumbing.options import COMMON, add_options, env_factory, parse_args, short_name
from plumbing.words import spelt_words_of, stem, stems_of
from reflect_rl import ACTION_HEADER, one_line, reflector_prompt

OPTIONS = {
    "trajectories": (200, "teacher trajectories", 1),
    "negatives": (0.5, "share of them that has mistakes, from 0 to 1", 0.0),
    "no_negatives": (False, "ablation: no mistakes, a share of 0"),
}
EXTRA_MISTAKES = 2  # in a negative trajectory, on average, beside the certain one
MOST_FAILURES = 20  # tasks in a row that the expert may fail on before the data set is given up


@dataclasses.dataclass
class Record:
    """One step of teacher data, a line of the JSONL file; a `UserError` where a field is not what it should be."""

    trajectory: int  # number of the trajectory in its data set
    negative: bool  # whether that trajectory is perturbed
    mistake: bool  # whether the action that led to this state was the perturbation
    state: str
    reflection: str  # any text; it is brought into its normal form
    actions: tuple
    action: int  # index of the expert's choice in `actions`

    def __post_init__(self):
        if isinstance(self.actions, list):  # JSON has no tuples
            self.actions = tuple(self.actions)
        check_types(self)
        try:  # half of a surrogate pair is a str to Python, and no text to a tokenizer
            "".join((self.state, self.reflection, *self.actions)).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(f"state, reflection and actions must be Unicode texts: {error}") from None
        if not 0 <= self.action < len(self.actions):
            raise UserError(f"action must be an index of the {len(self.actions)} actions, not {self.action}")
        self.reflection = one_line(self.reflection)


# ---------------------------------------------------------------------------------------------------------
# AutoExplore's sentences. The base LM's corpus has the same (models/nano/make.py): the base can finish these already,
# and would have to learn others first.


def asked(env):
    """The words of the question as they are spelt there, each with the stem by which it is compared."""
    return {word: stem(word.lower()) for word in spelt_words_of(env.question)}


def say_question(env):
    return f"The question has the words {', '.join(asked(env))}."


def say_name(env, place, name):
    """What a name has of the question; `place` is "The name" (of something here) or "On the way"."""
    stems = stems_of(name)
    found = [word for word, word_stem in asked(env).items() if word_stem in stems]
    return f"{place} {name} has {', '.join(found) or 'no word'}."


def say_file(env):
    """Where each word of the question was found: in the file just read, or else in its path."""
    in_file, in_path = stems_of(env.result), stems_of(" ".join(env.cwd))
    sentences = []
    for word, word_stem in asked(env).items():
        place = "the file" if word_stem in in_file else "the path" if word_stem in in_path else "neither"
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
    (verb, name), (last_verb, last_name) = env.moves[env.expert_action()], env.last
    parts = [say_question(env)]
    if last_verb == "cat":
        parts += say_file(env)
        if env.cwd + (last_name,) not in env.targets:
            parts.append("Mistake: that is the wrong file.")
    elif mistake:
        wrong = {("more", ""): "it was on another page", ("cd", ".."): "it was further down"}
        parts.append(f"Mistake: {wrong.get(env.last, f'{last_name}/ is the wrong way')}.")
    if verb != "id":
        here, _ = env.names_here()
        verdicts = [say_name(env, "The name", name) for name in here if name.endswith("/")]
        if len(verdicts) > 6:  # too long for a reflection: leave out those that do not fit
            verdicts = [verdict for verdict in verdicts if "no word" not in verdict]
        parts += verdicts + [say_name(env, "On the way", f"{name}/") for name in env.cwd]
    elif env.last != ("cat", name):  # the answer was read a while ago, and its text is not in the state any more
        parts.append(f"{name} has it.")
    goal = {"cd": "go down", "cat": "read a file here", "id": "identify it", "more": "turn the page"}[verb]
    if name == "..":
        parts.append("It is not here.")
        goal = "go up"
    return " ".join([*parts, f"Next: {goal}."])


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
    return verb in ("look", "inventory", "close", "use")


def errand(env):
    """The next sub-goal in words; of something that is to be found, the two best places to look for it."""
    verb, thing, place = env.subgoal()
    if verb == "find":
        homes, here = envs.homes_of(thing), env.notes.here
        hints = [other for other in envs.likely(thing, env.notes) if other == here or envs.kind(other) in homes]
        where = " or ".join(hints[:2])
        return f"find the {thing}, perhaps in {where}" if hints else f"find the {thing} in another place"
    words = {
        "take": f"get {thing} from {place}",
        "drop": f"put down {thing}",
        "use": f"light {thing} in {place}",
        "place": f"bring {thing} to {place}",
    }
    return words.get(verb, f"{verb} {thing} at {place}")  # else it is to be cleaned, heated or cooled


def reflect_on_household(env, mistake):
    """Where am I, was the last action of use, what do I know of the object, what is to be done."""
    notes, name, target = env.notes, env.goal["object"], env.goal["target"]
    wrong = f"To {notes.command.split()[0]} was of no use. " if mistake and useless(env) else ""
    shut = f" {notes.here} is closed." if notes.here in notes.shut else ""
    role = "lamp is a" if env.goal["type"].startswith("look") else "target is the"
    placed, known = [], []
    for thing, place in notes.where(name).items():
        if envs.kind(place) == target and env.ready(thing):
            placed.append(f"{thing} is placed.")
        else:
            known.append(f"{notes.title(thing)} is in {place}.")
    known = " ".join(placed[:1] + known[:1]) or f"No {name} was seen."
    if notes.hand and envs.kind(notes.hand) == name:
        known = f"In hand is {notes.title(notes.hand)}."
    here = notes.here or "the middle of the room"
    return f"{wrong}You are at {here}.{shut} The {role} {target}. {known} Next goal: {errand(env)}."


TEACHERS = {envs.DangerousTaxi: reflect_on_taxi, envs.AutoExplore: reflect_on_exploration,
            envs.ALFWorld: reflect_on_household}


def reflection_of(env, mistake):
    """The teacher's words on the current state. A class's own method comes before a built-in teacher."""
    own = type(env).reflection
    for cls, built_in in TEACHERS.items():
        if isinstance(env, cls) and own is envs.Env.reflection:
            return built_in(env, mistake)
    return own(env, mistake)  # where there is none, a UserError that names the class and the method


# ---------------------------------------------------------------------------------------------------------
# Trajectories


def replay(env, options, seed, actions):
    """Reset and take `actions` again; `(state, info, whether that was the end)`.

    Environments are deterministic given their seed, so this is how to go back.
    """
    state, info = env.reset(seed=seed, options=options)
    over = False
    for action in actions:
        state, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    return state, info, over


def steps_left(env, options, seed, actions):
    """Steps that the expert still needs after these actions; None if it does not get there."""
    _, info, over = replay(env, options, seed, actions)
    steps = 0
    while not over:
        _, _, terminated, truncated, info = env.step(env.expert_action())
        steps, over = steps + 1, terminated or truncated
    return steps if info["success"] else None


def perturbation(env, options, seed, history, count, rng):
    """An action that neither ends the episode nor brings the expert nearer to its goal; None if there is none.

    It is one of `env.mistakes()`; if the environment does not know them, each of the `count` actions is tried and the
    expert plays on to the end. The environment stays where it was.
    """
    known = env.mistakes()
    if known is not None:
        return rng.choice(known) if known else None
    here = steps_left(env, options, seed, history)
    actions, found = list(range(count)), None
    rng.shuffle(actions)
    for action in actions:
        # 0 where the action itself ended the episode, None where the expert no longer gets there.
        left = steps_left(env, options, seed, [*history, action])
        if left and (here is None or left >= here):
            found = action
            break
    replay(env, options, seed, history)
    return found


def trajectory(env, options, number, negative, seed, teacher=True):
    """One expert trajectory as `Record`s; None if the expert does not reach the goal.

    `teacher=False`: in place of a reflection stands the action taken before, which another teacher is told
    (models/endpoint.py).

    A negative one has a mistake at a random step, and about two more anywhere: also after a mistake, also at the goal.
    With a single mistake each, the reflector learned to call nothing a mistake. A few trajectories of AutoExplore have
    none: their steps were drawn where the answer had been read, and no mistake is possible.
    """
    length = steps_left(env, options, seed, [])  # first the expert alone: does it get there, and in how many steps?
    if length is None:
        return None
    rng = random.Random(seed)
    certain, share = rng.randrange(length), min(0.4, EXTRA_MISTAKES / length)  # one step, and a share of all
    history, records, mistake, over, last = [], [], False, False, ""
    state, info = env.reset(seed=seed, options=options)
    while not over:
        actions = tuple(info["actions"])  # a copy: an environment may change its list in the next step
        action = int(env.expert_action())
        # The label is the expert's action, whatever is done next.
        words = reflection_of(env, mistake) if teacher else last
        records.append(Record(number, negative, mistake, state, words, actions, action))
        detour = None
        if negative and (len(history) == certain or rng.random() < share):
            detour = perturbation(env, options, seed, history, len(actions), rng)
        mistake = detour is not None
        history.append(detour if mistake else action)
        last = actions[history[-1]]
        state, _, terminated, truncated, info = env.step(history[-1])
        over = terminated or truncated
    return records


def make_records(make_env, trajectories, negatives, seed, split="train", teacher=True):
    """`trajectories` expert trajectories on random tasks of a split, a share `negatives` of them perturbed.

    Returns `(records, failed)`: a task on which the expert fails is drawn again, and counted.
    """
    if not 0 <= negatives <= 1:
        raise UserError(f"--negatives is a share from 0 to 1, not {negatives}")
    env, rng = make_env(), random.Random(seed)
    tasks = env.tasks(split)
    if not tasks:
        raise UserError(f"{type(env).__name__} has no tasks in its {split} split")
    records, failed = [], 0
    perturbed = round(trajectories * negatives)  # the first ones: an exact share
    for number in range(trajectories):
        for _ in range(MOST_FAILURES):
            options = {**env.training, "task": rng.choice(tasks)}
            steps = trajectory(env, options, number, number < perturbed, rng.getrandbits(32), teacher)
            if steps is not None:
                break
            failed += 1
        if steps is None:
            name, task = type(env).__name__, str(options["task"])[:80]
            raise UserError(f"the expert of {name} failed on {MOST_FAILURES} tasks in a row, the last one {task}")
        records += steps
    return records, failed


# ---------------------------------------------------------------------------------------------------------
# Data sets


def read_records(path):
    """The records of a JSONL file; a malformed line is named by its number."""
    return read_lines(path, Record)


def hold_out(records):
    """`{"train": ..., "valid": ...}`: every sixth trajectory is held out; with fewer than six all are in both."""
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
            write_lines(path, records)
        data[split] = read_records(path)
    return data


def main():
    parser = argparse.ArgumentParser(description="Write a teacher data set and show it.")
    own = {
        "split": ("train", "split of the tasks"),
        "out": ("", "JSONL file to write; RUNS/ENV-data.jsonl if empty"),
        "teacher": ("rules", "who writes the reflections; openai: a server with OpenAI's API", ("rules", "openai")),
        "teacher_model": ("", "its name at the endpoint"),
    }
    endpoint = envs.beside("../models/endpoint.py")
    add_options(parser, COMMON, OPTIONS, own, endpoint.OPTIONS)
    args = parse_args(parser)
    make_env, rules = env_factory(args), args.teacher == "rules"
    chat = None if rules else endpoint.Chat(args.teacher_model, args)  # what it lacks shows now
    records, failed = make_records(make_env, args.trajectories, args.negatives, args.seed, args.split, rules)
    if not rules:
        records = endpoint.teach(records, make_env(), chat)
        if args.dry_run:
            return
    out = args.out or f"{args.runs}/{short_name(args.env)}-data.jsonl"
    write_lines(out, records)
    mistakes = 0
    for record in records:
        mistakes += record.mistake
        if record.trajectory == 0:  # shown as an example: the trajectories with mistakes come first
            action = record.actions[record.action]
            print(f"{reflector_prompt(record.state)}{record.reflection}\n{ACTION_HEADER}{action}\n")
    print(f"{out}: {len(records)} steps of {args.trajectories} trajectories, {mistakes} of them behind a mistake")
    if failed:
        print(f"the expert failed on {failed} tasks; others were drawn instead")


if __name__ == "__main__":
    envs.run_main(main)
