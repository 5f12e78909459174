"""Teacher data: labels, perturbations and reflections, checked against the map by maps.py, not by the environment."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import maps
import pytest

import envs
import negatives
from envs import UserError

GUARDS = json.loads((Path(__file__).parent / "guards.json").read_text())


def taxi_records(trajectories, share, **options):
    records, failed = negatives.make_records(envs.DangerousTaxi, trajectories, share, **options)
    assert failed == 0
    return records


@pytest.fixture(scope="module")
def records():
    return taxi_records(60, 0.5, seed=0)


def trajectories(records):
    return [list(group) for _, group in itertools.groupby(records, key=lambda record: record.trajectory)]


def last_action(state):
    return state.splitlines()[-1].removeprefix("Last action: ").removesuffix(".")


def executed(before, after):
    """The text of the action that led from one record to the next, read off the maps alone."""
    (taxi, *_), (now, passenger_now, _) = maps.parse(before.state), maps.parse(after.state)
    if taxi != now:
        return next(f"move {d}" for d in maps.DIRECTIONS if maps.neighbour(taxi, d) == now)
    return "pick up the passenger" if passenger_now is None else "drop off the passenger"


def needed(state):
    return maps.steps_needed(*maps.parse(state))


# ---------------------------------------------------------------------------------------------------------
# Trajectories


def test_labels_are_optimal_actions(records):
    """Catches the executed random action as a label (which teaches the mistake), and an index into another menu."""
    for record in records:
        assert tuple(record.actions) == maps.MENU
        assert record.actions[record.action] in maps.optimal(record.state), record.state


def test_a_mistake_is_useless_but_not_fatal(records):
    """Catches perturbations that help, that kill, or that are also the label: the walk goes on from a state that is no
    nearer to the goal, and the next label differs from what was done."""
    mistakes = [(a, b) for t in trajectories(records) for a, b in itertools.pairwise(t) if b.mistake]
    assert len(mistakes) >= 25
    for before, after in mistakes:
        done = executed(before, after)
        assert done == last_action(after.state) and "fatal" not in after.state
        assert done != before.actions[before.action], "the perturbed action became the label"
        assert done not in maps.optimal(before.state) and needed(after.state) >= needed(before.state)


def test_other_steps_follow_the_expert(records):
    """Catches a mistake that is made but not told: every step without `mistake` was the label before it."""
    for before, after in (pair for t in trajectories(records) for pair in itertools.pairwise(t) if not pair[1].mistake):
        assert executed(before, after) == before.actions[before.action] == last_action(after.state)
        assert needed(after.state) == needed(before.state) - 1


def test_trajectories_begin_fresh_and_end_at_the_goal(records):
    """Catches a trajectory cut short: its last label must be the drop-off at the destination."""
    for steps in trajectories(records):
        assert last_action(steps[0].state) == "none" and not steps[0].mistake
        assert needed(steps[-1].state) == 1 and steps[-1].actions[steps[-1].action] == "drop off the passenger"


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_counts_of_negatives(share, count):
    """Catches a share that is a probability, negatives without a mistake, positives with one."""
    found = trajectories(taxi_records(20, share, seed=1))
    assert len(found) == 20 and [steps[0].trajectory for steps in found] == list(range(20))
    assert sum(steps[0].negative for steps in found) == count
    for steps in found:
        assert len({step.negative for step in steps}) == 1
        mistakes = sum(step.mistake for step in steps)
        assert bool(mistakes) == steps[0].negative
    perturbed = [sum(step.mistake for step in steps) for steps in found if steps[0].negative]
    assert not perturbed or 1.5 < sum(perturbed) / len(perturbed) < 6


def test_mistakes_are_made_anywhere(records):
    """Catches a perturbation that always comes at the same step: the reflector would learn the time, not the
    mistake."""
    when = [index for steps in trajectories(records) for index, step in enumerate(steps) if step.mistake]
    assert len(set(when)) >= 5 and min(when) <= 2 and max(when) >= 8


def test_seed_decides_everything():
    """Catches draws from the process-wide RNG, and a seed that is ignored."""
    random.seed(1)
    first = taxi_records(8, 0.5, seed=3)
    random.seed(2)
    assert taxi_records(8, 0.5, seed=3) == first
    assert taxi_records(8, 0.5, seed=4) != first


@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_comes_from_its_split(split):
    """Catches teacher data on held-out starts."""
    env = envs.make("taxi")
    starts = {env.reset(options={"task": task})[0] for task in env.tasks(split)}
    for steps in trajectories(taxi_records(15, 0.5, seed=0, split=split)):
        assert steps[0].state in starts


# ---------------------------------------------------------------------------------------------------------
# The teacher


def cells(text):
    return [(int(r), int(c)) for r, c in re.findall(r"row (\d) column (\d)", text)]


def test_teacher_tells_the_truth(records):
    """Catches swapped rows and columns, the wrong sub-goal, a wall on the wrong side: every text against the parsed
    map."""
    for record in records:
        taxi, passenger, destination = maps.parse(record.state)
        goal, name = (destination, "destination") if passenger is None else (passenger, "passenger")
        text = record.reflection
        assert cells(text) == [taxi, goal], text
        assert f"the {name} at" in text and ("on board" in text) == (passenger is None)
        sides = re.search(r"Blocked: ([\w, ]+)\.", text)[1].split(", ")
        assert set(sides) == (maps.blocked(taxi) or {"nothing"}), text
        south, east = goal[0] - taxi[0], goal[1] - taxi[1]
        told = {d: int(n) for n, d in re.findall(r"(\d) (south|north|east|west)", text)}
        assert (
            told.get("south", 0) - told.get("north", 0) == south and told.get("east", 0) - told.get("west", 0) == east
        ), text


def test_mistake_is_told_when_it_was_made_and_only_then(records):
    """Catches a teacher that never mentions mistakes, or always does; the text names what was done."""
    for record in records:
        assert ("mistake" in record.reflection) == record.mistake
        assert not record.mistake or last_action(record.state) in record.reflection


def test_teacher_leaves_the_decision_to_the_policy(records):
    """Catches a reflection that hands over the action: SFT would copy it, and RL would have no entropy left."""
    for record in records:
        plan = re.sub(r"To [^.]* was a mistake\.", "", record.reflection)
        assert not any(action in plan for action in record.actions), record.reflection


@pytest.mark.parametrize("name, splits", [("taxi", ("train", "valid")), ("alfworld", ("valid",))])
def test_shipped_teacher_data_is_what_it_was(name, splits):
    """Catches a draw more or less, another word of a teacher, another order of the tasks: byte by byte, seed 0."""
    make, settings = envs.env_class(name), envs.env_class(name).settings
    for split in splits:
        count = settings.get("trajectories", 200) // (1 if split == "train" else 5)
        records, failed = negatives.make_records(make, count, settings.get("negatives", 0.5), 0, split)
        text = "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == GUARDS[f"{name} teacher data {split}"]
        assert failed == 0


def test_exploration_says_where_each_word_is():
    """Catches a word of the path called one of the file, the question's spelling lost, families not compared."""
    tree = {"Roasting": {"prices.md": "The owner sets them.", "other.md": "roasts"}}
    env = envs.AutoExplore.__new__(envs.AutoExplore)
    env.question, env.result = "Which file about roasters says: OWNER pays prices?", tree["Roasting"]["prices.md"]
    env.cwd = ("Roasting",)
    assert negatives.say_question(env) == "The question has the words roasters, OWNER, pays, prices."
    assert negatives.say_file(env) == [
        "roasters is in the path.",
        "OWNER is in the file.",
        "pays is in neither.",
        "prices is in neither.",
    ]
    assert negatives.say_name(env, "On the way", "Roasting/") == "On the way Roasting/ has roasters."
    assert negatives.say_name(env, "The name", "prices.md") == "The name prices.md has prices."
    assert negatives.say_name(env, "The name", "x.md") == "The name x.md has no word."


# ---------------------------------------------------------------------------------------------------------
# Environments of one's own


class Line(envs.Env):
    """A walk from cell 0 to cell 3. It gives out one and the same info and list of actions, changed in place."""

    def __init__(self):
        self.info = {"actions": [], "success": False}

    def tasks(self, split):
        return list(range(10))

    def reset(self, *, seed=None, options=None):
        self.task, self.cell, self.steps = options["task"], 0, 0
        return self.look(), self.info

    def look(self):
        self.info["actions"][:] = [f"stay at {self.cell}", f"leave {self.cell}"]
        self.info["success"] = self.cell == 3
        return f"cell {self.cell}"

    def step(self, action):
        self.cell, self.steps = self.cell + action, self.steps + 1
        state = self.look()
        return state, 0.0, self.info["success"], self.steps == 9, self.info

    def expert_action(self):
        return 1

    def reflection(self, mistake):
        return "Go\n on,   please." + " A mistake." * mistake


def test_an_environment_may_reuse_its_info():
    """Catches records that hold the environment's own list: all would show the menu of the last state."""
    records, _ = negatives.make_records(Line, 6, 0.5, 0)
    for record in records:
        cell = record.state.removeprefix("cell ")
        assert record.actions == (f"stay at {cell}", f"leave {cell}")
    assert any(record.mistake for record in records)


def test_reflections_have_one_normal_form(tmp_path):
    """Catches line breaks and double spaces that SFT trains and play folds: in a teacher's text, and in a file."""
    records, _ = negatives.make_records(Line, 2, 0.0, 0)
    assert {record.reflection for record in records} == {"Go on, please."}
    line = json.dumps(dataclasses.asdict(records[0]) | {"reflection": "two\n lines  "})
    (tmp_path / "data.jsonl").write_text(line)
    assert negatives.read_records(tmp_path / "data.jsonl")[0].reflection == "two lines"


class Unlucky(Line):
    """Its expert never gets there on more than half of the tasks."""

    hopeless = range(6)

    def expert_action(self):
        return int(self.task not in self.hopeless)


def test_an_expert_that_fails_is_drawn_again_and_counted():
    """Catches a data set that ends, or is short, where the expert fails on a single task."""
    records, failed = negatives.make_records(Unlucky, 30, 0.5, 0)
    assert failed > 0 and [steps[0].trajectory for steps in trajectories(records)] == list(range(30))
    assert sum(steps[0].negative for steps in trajectories(records)) == 15


def test_an_expert_that_always_fails_is_one_line():
    with pytest.raises(UserError, match="expert of Hopeless failed on 20 tasks in a row, the last one [0-9]"):
        negatives.make_records(type("Hopeless", (Unlucky,), {"hopeless": range(10)}), 30, 0.5, 0)


@pytest.mark.parametrize("base", [Line, envs.DangerousTaxi])
def test_ones_own_reflection_wins(base):
    """Catches a subclass of a built-in environment whose `reflection` is never called."""
    env = type("Mine", (base,), {"reflection": lambda self, mistake: f"My {mistake}."})()
    env.reset(options={"task": env.tasks("train")[0]})
    assert negatives.reflection_of(env, True) == "My True."


@pytest.mark.parametrize("method", ["reset", "step", "tasks", "expert_action", "reflection"])
def test_a_missing_method_is_named_in_one_line(method):
    """Catches a traceback, or a message that does not say what is missing where."""
    lacking = type("Lacking", (Line,), {method: getattr(envs.Env, method)})
    with pytest.raises(UserError, match=f"(?s)^(?=.*Lacking)(?=.*{method})[^\n]*$"):
        negatives.make_records(lacking, 2, 0.0, 0)


def test_known_mistakes_are_used():
    """Catches `mistakes()` that is never asked, and an empty list taken for "not known"."""
    none = type("None", (Line,), {"mistakes": lambda self: []})
    assert not any(record.mistake for record in negatives.make_records(none, 5, 1.0, 0)[0])
    away = type("Away", (Line,), {"mistakes": lambda self: [0]})
    assert sum(record.mistake for record in negatives.make_records(away, 5, 1.0, 0)[0]) >= 5


@pytest.mark.parametrize("reflection", [None, 3, "half \ud800 a pair"])
def test_a_teacher_that_gives_no_text_is_one_line(reflection):
    """Catches a lone surrogate that only the tokenizer refuses, after the data was written."""
    env = type("Mute", (Line,), {"reflection": lambda self, mistake: reflection})
    with pytest.raises(UserError, match="reflection must be of type str|Unicode texts"):
        negatives.make_records(env, 2, 0.0, 0)


def test_no_tasks_and_no_share_are_one_line():
    with pytest.raises(UserError, match="no tasks in its valid split"):
        negatives.make_records(type("Empty", (Line,), {"tasks": lambda self, split: []}), 2, 0.0, 0, "valid")
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="share from 0 to 1"):
            negatives.make_records(Line, 2, share, 0)


# ---------------------------------------------------------------------------------------------------------
# JSONL


def test_round_trip(records, tmp_path):
    path = tmp_path / "new" / "data.jsonl"
    negatives.write_lines(path, records)
    assert negatives.read_records(path) == records
    assert path.read_bytes().count(b"\n") == len(records), "one line a record"


@pytest.mark.parametrize("beginning, end", [("", ""), ("", "\n"), ("", "\n\n \n"), ("\ufeff", "\n"), ("", "\r\n")])
def test_only_a_new_line_ends_a_record(beginning, end, records, tmp_path):
    """Catches `splitlines`, which also breaks at U+2028 and U+0085; a byte order mark; blank last lines."""
    odd = dataclasses.replace(records[0], state="a\u2028b\u0085c\x0bd", reflection="e\u2028f")
    text = "\n".join(json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in (odd, records[1]))
    (tmp_path / "data.jsonl").write_bytes((beginning + text + end).encode())
    read = negatives.read_records(tmp_path / "data.jsonl")
    assert read == [dataclasses.replace(odd, reflection="e f"), records[1]]


@pytest.mark.parametrize(
    "change",
    [
        "not json",
        "[1, 2]",
        {"action": 6},
        {"action": -1},
        {"action": "1"},
        {"action": None},
        {"action": True},
        {"action": 1.0},
        {"actions": "abcdef"},
        {"actions": []},
        {"actions": ["a", 2, "c", "d", "e", "f"]},
        {"actions": None},
        {"state": None},
        {"state": "half \ud800 a pair"},
        {"reflection": 3},
        {"trajectory": "0"},
        {"mistake": "no"},
        {"colour": 1},
        "[" * 100_000,
        "",
    ],
)
def test_malformed_line_is_named_by_number(change, records, tmp_path):
    """Catches a traceback, a skipped line, and Python's negative index, under which -1 is the last action."""
    lines = [json.dumps(dataclasses.asdict(record)) for record in records[:5]]
    lines[2] = change if isinstance(change, str) else json.dumps(json.loads(lines[2]) | change)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 3"):
        negatives.read_records(path)


def test_missing_field_is_named_by_number(records, tmp_path):
    line = dataclasses.asdict(records[0])
    del line["reflection"]
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="line 1.*reflection"):
        negatives.read_records(tmp_path / "data.jsonl")


def test_unreadable_files_are_one_line(tmp_path):
    for text in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(text)
        with pytest.raises(UserError, match="empty"):
            negatives.read_records(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="latin.jsonl is not UTF-8"):
        negatives.read_records(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("count, held", [(1, []), (5, []), (6, [5]), (13, [5, 11])])
def test_every_sixth_trajectory_is_held_out(count, held):
    """Catches records of one trajectory on both sides, and an empty held-out part of few."""
    records, _ = negatives.make_records(Line, count, 0.0, 0)
    data = negatives.hold_out(records)
    numbers = {split: {record.trajectory for record in data[split]} for split in data}
    assert numbers["train"] == set(range(count)) - set(held)
    assert numbers["valid"] == set(held) or (not held and data["valid"] == data["train"])


def test_teacher_data_is_made_once(tmp_path, capsys):
    """Catches data that is made anew over what a finished stage rests on, and failures that nobody is told of."""
    args = argparse.Namespace(trajectories=12, negatives=0.5, seed=0)
    data = negatives.teacher_data(tmp_path, Unlucky, args)
    assert {split: len(trajectories(data[split])) for split in data} == {"train": 12, "valid": 10}
    assert "failed on" in capsys.readouterr().out
    written = (tmp_path / "train.jsonl").read_bytes()
    args.trajectories = 3
    assert negatives.teacher_data(tmp_path, Line, args) == data
    assert (tmp_path / "train.jsonl").read_bytes() == written
