"""Teacher data: labels, perturbations and reflections, checked against the map by maps.py, not by the environment."""

import dataclasses
import itertools
import json
import random
import re

import maps
import pytest

import envs
import negatives
from envs import UserError
from reflect_rl import LABELS


@pytest.fixture(scope="module")
def records():
    return negatives.make_records(envs.DangerousTaxi, 60, 0.5, seed=0)


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
    found = trajectories(negatives.make_records(envs.DangerousTaxi, 20, share, seed=1))
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
    first = negatives.make_records(envs.DangerousTaxi, 8, 0.5, seed=3)
    random.seed(2)
    assert negatives.make_records(envs.DangerousTaxi, 8, 0.5, seed=3) == first
    assert negatives.make_records(envs.DangerousTaxi, 8, 0.5, seed=4) != first


@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_comes_from_its_split(split):
    """Catches teacher data on held-out starts."""
    env = envs.make("taxi")
    starts = {env.reset(options={"task": task})[0] for task in env.tasks(split)}
    for steps in trajectories(negatives.make_records(envs.DangerousTaxi, 15, 0.5, seed=0, split=split)):
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


def test_an_environment_brings_its_teacher():
    env = envs.make("corridor:Corridor")
    env.reset(options={"task": [0, 3]})
    assert negatives.teacher_of(env)(env, True) == "That was a mistake. The goal is 3 away."
    with pytest.raises(UserError, match="reflection"):
        negatives.teacher_of(object())


# ---------------------------------------------------------------------------------------------------------
# JSONL


def test_round_trip(records, tmp_path):
    path = tmp_path / "new" / "data.jsonl"
    negatives.write_records(records, path)
    assert negatives.read_records(path) == records
    assert len(path.read_text().splitlines()) == len(records), "one line a record"


@pytest.mark.parametrize(
    "change",
    [
        "not json",
        "[1, 2]",
        {"action": 6},
        {"action": -1},
        {"action": "1"},
        {"action": None},
        {"actions": "abcdef"},
        {"actions": []},
        {"state": None},
        {"reflection": 3},
        {"colour": 1},
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


def test_empty_and_missing_files_are_user_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        negatives.read_records(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="nowhere"):
        negatives.read_records(tmp_path / "nowhere.jsonl")


# ---------------------------------------------------------------------------------------------------------
# SFT examples and the corpus


def test_the_three_forms(records):
    """Catches a reflection in the ablation's prompt, or none in the policy's; completions are text and label."""
    record = next(record for record in records if record.mistake)

    def labels(actions):
        return "QRSTUV", range(6)

    [(prompt, completion)] = negatives.sft_examples([record], "reflect", labels)
    assert (prompt, completion) == (f"{record.state}\n# Analyze:\n", record.reflection)
    for form, has_reflection in (("policy", True), ("plain", False)):
        [(prompt, completion)] = negatives.sft_examples([record], form, labels)
        assert completion == "QRSTUV"[record.action] and f"\n{completion} {record.actions[record.action]}\n" in prompt
        assert (record.reflection in prompt) == ("# Analyze" in prompt) == has_reflection
        assert prompt.startswith(record.state) and prompt.endswith("# Action:\n")


@pytest.fixture(scope="module")
def corpus():
    return [
        negatives.corpus_document(envs.DangerousTaxi, random.Random(i), lambda actions: (LABELS, None))
        for i in range(400)
    ]


def test_corpus_has_no_reflection(corpus):
    """Catches teacher text in the base LM: then what SFT adds would not be SFT's."""
    for document in corpus:
        said = r"# Analyze|Next goal: the|To (move \w+|pick up the passenger|drop off the passenger) was a mistake"
        assert not re.search(said + r"|Passenger (on board|waiting)\.", document), document


def test_corpus_has_no_expert_label(corpus):
    """Catches expert actions in the base LM's text: the action taken is optimal as often as a fair die would have
    it."""
    expected, variance, optimal = 0.0, 0.0, 0
    for document in corpus:
        menu = dict(
            line.split(" ", 1) for line in re.search(r"# Actions:\n(.*)# Action:\n", document, re.S)[1].splitlines()
        )
        label = document.split("# Action:\n")[1].splitlines()[0]
        if "O" not in document.split("# ")[0] and parses(document):
            good = maps.optimal(document)
            p = len(good) / len(menu)
            expected, variance, optimal = expected + p, variance + p * (1 - p), optimal + (menu[label] in good)
    assert variance > 30, "too few documents to tell"
    assert abs(optimal - expected) < 4.5 * variance**0.5, (
        f"{optimal} optimal actions, {expected:.0f} expected by chance"
    )


def parses(document):
    """Whether the map is one of an ordinary trip (in `pickup` mode no play goes on after a pickup)."""
    rows = document.splitlines()[1:6]
    return any("T" in row or "X" in row for row in rows)


def test_corpus_menus_are_shuffled(corpus):
    """Catches a base LM that learns "A is south" rather than "a label means its line"."""
    first = [re.search(r"# Actions:\nA (.*)\n", document)[1] for document in corpus]
    assert set(first) == set(maps.MENU)


def test_corpus_comes_from_train_starts_only():
    """Catches random play on test starts: a walk of length 0 shows the start itself."""
    env = envs.make("taxi")
    seen = {negatives.random_walk(env, random.Random(i), 0)[0] for i in range(300)}
    allowed = {env.reset(options={"task": task, "mode": mode})[0] for task in env.tasks("train") for mode in env.modes}
    assert seen <= allowed
