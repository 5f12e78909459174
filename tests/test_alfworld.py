"""ALFWorld: the contract, the tasks, the expert, the teacher, and parity with the real engine where it is installed."""

import collections
import gzip
import hashlib
import json
import pathlib
import random
import re
import sys

import pytest

import envs
import negatives

TYPES = list(envs.household()["sentences"])
built_in, engine = envs.beside("alfworld/engine.py"), envs.beside("alfworld/real_engine.py")


def maker(name):
    """A script of data/alfworld as a module."""
    return envs.beside(f"alfworld/{name}.py")


def tokens(text):
    """Length of a text in tokens of the project's kind: a word, a digit, a punctuation mark, a space before a digit."""
    return len(re.findall(r" ?[A-Za-z]+|\d|[^\sA-Za-z\d]|\s", text))


def play(env, task, seed=0, noise=0.0, options=(), look=lambda env, mistake: None):
    """One episode of the expert, with a random action instead of its own at a rate of `noise`; the return."""
    rng, total, over, mistake = random.Random(seed), 0.0, False, False
    _, info = env.reset(seed=seed, options={"task": task, **dict(options)})
    while not over:
        look(env, mistake)
        action = env.expert_action()
        mistake = rng.random() < noise
        _, reward, terminated, truncated, info = env.step(rng.randrange(len(info["actions"])) if mistake else action)
        total, over = total + reward, terminated or truncated
    return total


def task_for(type_name, split="train"):
    return next(task for task in envs.make("alfworld").tasks(split) if task["type"] == type_name)


# The contract.


def test_contract():
    env = envs.make("alfworld")
    state, info = env.reset(seed=3)
    assert state.startswith("Your task is to: ") and not info["success"] and "help" not in info["actions"]
    assert (state, info) == env.reset(seed=3), "two resets with one seed differ"
    with pytest.raises(IndexError):
        env.step(len(info["actions"]))
    for number in range(env.horizon):
        _, _, terminated, truncated, _ = env.step(info["actions"].index("look"))
        assert not terminated and truncated == (number == env.horizon - 1)
    with pytest.raises(RuntimeError):
        env.step(0)


def test_the_global_generator_is_left_alone_and_ignored():
    env, task = envs.make("alfworld"), task_for(TYPES[0])
    random.seed(1)
    before, state = random.getstate(), env.reset(seed=0, options={"task": task})[0]
    assert random.getstate() == before
    random.seed(2)
    assert envs.make("alfworld").reset(seed=9, options={"task": task})[0] == state


ROOM = {"type": TYPES[0], "object": "mug", "target": "desk", "sentence": "put a mug in desk"}
ROOM |= {"receptacles": ["desk 1", "shelf 1"], "objects": {"mug 1": "shelf 1"}}
@pytest.mark.parametrize("wrong", [3, "kitchen", []])
def test_a_task_that_is_no_dictionary_is_one_line(wrong):
    with pytest.raises(envs.UserError, match="dictionary"):
        envs.make("alfworld").reset(options={"task": wrong})


def test_a_task_of_ones_own_is_played():
    env = envs.make("alfworld")
    for sentence in (ROOM["sentence"], "I would like the mug to be on my desk"):
        play(env, ROOM | {"sentence": sentence})
        assert env.success, "where the sentence fits no template, the goal of the task is known"


def test_without_a_goal_all_that_was_seen_is_listed_in_a_fixed_order():
    """The names once came out of a set: another PYTHONHASHSEED gave other states."""
    env = envs.make("alfworld")
    env.reset(options={"task": ROOM})
    env.goal = None
    env.notes.update("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 1, a cd 1, and a pen 2.")
    assert "\nSeen: cd 1 (shelf 1), mug 1 (shelf 1), pen 2 (shelf 1).\n" in env.render()
    with pytest.raises(envs.UserError, match="no search expert"):
        env.expert_action()


def test_wrong_options_are_user_errors(tmp_path):
    for call in (
        lambda: envs.make("alfworld").tasks("tset"),
        lambda: envs.make("alfworld", games=tmp_path),
        lambda: envs.make("alfworld", games=3),
        lambda: envs.make("alfworld", horizon="long"),
    ):
        with pytest.raises(envs.UserError):
            call()


# The tasks.


def test_tasks_and_rooms_are_those_of_the_guards():
    """The rooms were once drawn when they were asked for; the hashes are of that time."""
    guards = json.loads(pathlib.Path(__file__).with_name("guards.json").read_text())
    for split in ("train", "valid", "test", "final"):
        tasks, rooms = [], []
        for task in envs.make("alfworld").tasks(split):
            tasks.append([task[name] for name in ("type", "room", "object", "target", "seed")])
            rooms.append([task["receptacles"], list(task["objects"].items()), task["sentence"]])
        for name, value in (("tasks", tasks), ("rooms", rooms)):
            digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
            assert digest == guards[f"alfworld {name} {split}"], (name, split)


def test_the_shipped_tasks_are_what_their_maker_makes(monkeypatch, tmp_path):
    prepare = maker("prepare")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--check"])
    prepare.main()
    changed = json.loads(gzip.decompress(prepare.FILE.read_bytes()))
    changed["test"][5]["objects"].popitem()
    monkeypatch.setattr(prepare, "FILE", tmp_path / "tasks.json.gz")
    prepare.FILE.write_bytes(gzip.compress(json.dumps(changed).encode()))
    with pytest.raises(SystemExit, match="is not what"):
        prepare.main()


def test_splits_are_disjoint_in_rooms_and_held_out_combinations():
    """The room counts for nothing in a combination: training had two "unseen" ones in another kind of room."""
    rooms, combinations = {}, collections.defaultdict(set)
    for split, count in (("train", 300), ("valid", 10), ("test", 20), ("final", 20)):
        tasks = envs.make("alfworld").tasks(split)
        assert collections.Counter(task["type"] for task in tasks) == dict.fromkeys(TYPES, count)
        rooms[split] = {tuple(task["receptacles"]) for task in tasks}
        for task in tasks:
            combinations[split, task["combination"]].add((task["type"], task["object"], task["target"]))
    assert sum(map(len, rooms.values())) == len(set.union(*rooms.values()))
    known = combinations.pop(("train", "seen"))
    unknown = {("test", "unseen"), ("final", "unseen")}
    assert set(combinations) == {("valid", "seen"), ("test", "seen"), ("final", "seen"), *unknown}
    for key, found in combinations.items():
        assert not found & known if key in unknown else found <= known, key
    for split in ("test", "final"):
        unseen = sum(task["combination"] == "unseen" for task in envs.make("alfworld").tasks(split))
        assert 55 <= unseen <= 60, "half of 120"


# The expert and the teacher.


def test_the_expert_succeeds_with_room_to_spare():
    env, lengths = envs.make("alfworld"), []
    for task in sum(map(env.tasks, ("train", "valid", "test", "final")), []):
        play(env, task)
        assert env.success, task
        lengths.append(env.steps)
    assert max(lengths) <= env.horizon - 10


def test_the_expert_recovers_from_random_detours():
    env = envs.make("alfworld", horizon=60)
    for seed, task in enumerate(env.tasks("valid") * 5):
        play(env, task, seed, noise=0.3)
        assert env.success, (seed, task)


def test_what_expert_and_teacher_do_is_a_function_of_the_state():
    """Otherwise equal states would have several labels, and a memoised reflection would be wrong for some of them."""
    env, actions, reflections = envs.make("alfworld", horizon=60), {}, {}

    def look(env, mistake):
        state, command = env.render(), env.actions[env.expert_action()]
        assert actions.setdefault(state, command) == command, state
        reflection = negatives.reflect_on_household(env, mistake)
        assert mistake or not negatives.useless(env), f"the expert's own move counts as useless:\n{state}"
        assert reflections.setdefault(state, reflection) == reflection, state
        assert tokens(reflection) <= 60 and command not in reflection, reflection

    for seed, task in enumerate([*env.tasks("train")[::4], *env.tasks("test")]):
        play(env, task, seed, noise=0.25 * (seed % 2), look=look)


def test_states_are_small_and_show_all_places_and_notes_are_true():
    """Notes are checked against the engine's own state, which they never read."""
    env = envs.make("alfworld")

    def look(env, mistake):
        first, unsearched, searched, *_ = env.render().splitlines()
        notes, house = env.notes, env.house
        assert first == f"Your task is to: {house.sentence}."
        for place in house.receptacles:
            assert (f" {place}," in unsearched + searched) or (f" {place}." in unsearched + searched)
        assert tokens(env.render()) <= 170, env.render()
        assert len(env.actions) <= 20 and len(set(env.actions)) == len(env.actions)
        for place, things in notes.contents.items():
            assert sorted(things) == sorted(house.contents[place])
            assert (place in notes.shut) == (place in house.shut), place
        assert (notes.here, notes.hand, notes.lit) == (house.here, house.hand, house.lit)
        for thing, traits in house.traits.items():
            assert notes.traits.get(thing, set()) == traits, thing

    for seed, task in enumerate([*env.tasks("test"), *env.tasks("valid")]):
        play(env, task, seed, noise=0.3, look=look)


@pytest.mark.parametrize("type_name", TYPES)
def test_milestones_are_paid_once(type_name):
    """Taking and putting down again and again must not be a way to earn."""
    env, task = envs.make("alfworld"), task_for(type_name)
    plain, paid = play(env, task), play(env, task, options={"milestone": 0.5})
    assert plain == pytest.approx(1 - 0.01 * env.steps)
    assert paid == pytest.approx(plain + 0.5 * len(env.reached)) and {"found", "taken"} <= env.reached
    env.reset(options={"task": task, "milestone": 0.5})
    while "taken" not in env.reached:
        env.step(env.expert_action())
    for _ in range(3):
        origin = env.notes.origin
        for command in (f"move {env.notes.hand} to {origin}", f"take {env.notes.hand} from {origin}"):
            _, reward, *_ = env.step(env.actions.index(command))
            assert reward == pytest.approx(-0.01), command


# Game files.


def test_games_are_found_in_order_by_split_and_none_is_left_out_silently(tmp_path, capsys):
    for name in ("train/b", "train/a", "valid_seen/c", "valid_unseen/d", "e", "train/unsolvable", "train/movable-f"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "game.tw-pddl").write_text(json.dumps({"solvable": "unsolvable" not in name}))
    games = engine.find_games(tmp_path)
    found = {split: [pathlib.Path(task["game"]).parent.name for task in tasks] for split, tasks in games.items()}
    assert found == {"train": ["a", "b"], "valid": ["c"], "test": ["e", "d"]}
    assert "2 games" in capsys.readouterr().err
    for broken in ("{", "[]"):
        (tmp_path / "e" / "game.tw-pddl").write_text(broken)
        with pytest.raises(envs.UserError, match="cannot read"):
            engine.find_games(tmp_path)


def test_a_missing_or_old_package_is_one_line(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "textworld", None)
        with pytest.raises(envs.UserError, match="pip install alfworld"):
            maker("write_games").write_game(task_for(TYPES[0]), tmp_path)
    pytest.importorskip("alfworld")
    monkeypatch.setattr(engine.importlib.metadata, "version", lambda name: "0.3.5")
    with pytest.raises(envs.UserError, match="too old.*pip install alfworld"):
        engine.import_alfworld()


def test_the_order_of_the_real_engine_does_not_reach_the_state():
    text = "On the shelf 1, you see a vase 2, a statue 1, and a vase 1."
    assert engine.sort_lists(text) == "On the shelf 1, you see a statue 1, a vase 1, and a vase 2."
    assert engine.sort_lists("You see a shelf 10, and a shelf 2.") == "You see a shelf 2, and a shelf 10."


# The real engine. These tests need the extras, and are skipped without them.


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """60 rooms, ten of each type, half of them with unseen combinations, as real game files: `{path: task}`."""
    pytest.importorskip("alfworld")
    pytest.importorskip("textworld")
    folder, write_game = tmp_path_factory.mktemp("games"), maker("write_games").write_game
    tasks = [task for number, task in enumerate(envs.make("alfworld").tasks("test")) if number % 20 < 10]
    return {write_game(task, folder / "test"): task for task in tasks}


def command_sequence(house, rng):
    """A generator of commands: the expert's, or one of a random verb (so that rare verbs are tried), or nonsense."""
    expert = envs.make("alfworld")
    expert.reset(options={"task": house.task})
    while True:
        by_verb = collections.defaultdict(list)
        for command in house.commands():
            by_verb[command.split()[0]].append(command)
        command = rng.choice(by_verb[rng.choice(sorted(by_verb))])
        draw = rng.random()
        if draw < 0.5 and not expert.done:
            command = expert.actions[expert.expert_action()]
        elif draw < 0.55:
            command = rng.choice(("take mug 9 from shelf 9", "open the pod bay doors", "move apple 1 to fridge 1"))
        if not expert.done and command in expert.actions:
            expert.step(expert.actions.index(command))
        yield command


@pytest.mark.extra
def test_parity_with_the_real_engine(games):
    """Observations, admissible commands and `won` agree on every step; enumerations are compared in sorted order, since
    TextWorld prints them in the order of a set, which changes with PYTHONHASHSEED."""
    won = 0
    for number, (path, task) in enumerate(games.items()):
        house, real = built_in.House(task), engine.House({"game": path})
        assert house.reset() == real.reset()
        source = command_sequence(house, random.Random(number))
        for _ in range(30):
            assert house.commands() == sorted(real.commands()) and house.won == real.won
            if house.won:
                won += 1
                break
            command = next(source)
            assert house.do(command) == real.do(command), (task, command)
    assert won > 20, "the sequences should reach the end of many games"


@pytest.mark.extra
def test_parity_of_treatments(games):
    """Random play rarely treats one thing twice; here all is done to one object, and examined after each step."""
    treatable = ("tomato", "apple", "potato", "egg")
    path, task = next(item for item in games.items() if "heat" in item[1]["type"] and item[1]["object"] in treatable)
    house, real = built_in.House(task), engine.House({"game": path})
    house.reset(), real.reset()
    thing, place = next(item for item in task["objects"].items() if envs.kind(item[0]) == task["object"])
    script = [f"go to {place}", f"open {place}", f"take {thing} from {place}", f"examine {thing}"]
    for verb in ("clean", "cool", "heat", "clean", "cool"):
        station = envs.STATIONS[verb] + " 1"
        script += [f"go to {station}", f"{verb} {thing} with {station}", f"examine {thing}", "inventory", "look"]
    for command in script:
        assert house.do(command) == real.do(command), command
        assert house.commands() == sorted(real.commands()), command


@pytest.mark.extra
def test_the_same_class_plays_the_real_engine(games):
    """Same states, rewards, groups and milestones through the whole contract, with two games open at once; neither
    engine touches the global generator."""
    folder = pathlib.Path(next(iter(games))).parents[3]
    real, ours = envs.make("alfworld", games=folder), envs.make("alfworld")
    tasks, generator = real.tasks("test"), random.getstate()
    assert len(tasks) == len(games) and {task["type"] for task in tasks} == set(TYPES)
    with pytest.raises(envs.UserError, match="unknown split 'train': there are tasks of test"):
        real.tasks("train")
    for task in tasks[::6]:
        (state, info), over = real.reset(options={"task": task}), False
        assert (state, info) == ours.reset(options={"task": games[task["game"]]})
        assert real.goal == ours.goal == engine.goal_beside(task["game"])
        assert real.groups(task) == ours.groups(games[task["game"]])
        while not over:
            action = ours.expert_action()
            assert action == real.expert_action()
            step = real.step(action)
            assert step == ours.step(action)
            over = step[2] or step[3]
        assert real.success
    assert random.getstate() == generator
    with pytest.raises(envs.UserError, match="cannot read"):
        real.reset(options={"task": {"game": str(folder / "no.tw-pddl")}})
    with pytest.raises(envs.UserError, match="only a task of the built-in ALFWorld"):
        maker("write_games").write_game(tasks[0], folder)


@pytest.mark.extra
def test_a_damaged_game_is_one_line(games, tmp_path):
    whole = json.loads(pathlib.Path(next(iter(games))).read_text())
    for damaged in ({"solvable": True}, whole | {"pddl_problem": whole["pddl_problem"][:500]}):
        (tmp_path / "game.tw-pddl").write_text(json.dumps(damaged))
        env = envs.make("alfworld", games=tmp_path)
        with pytest.raises(envs.UserError, match="cannot be played") as error:
            env.reset(options={"task": env.tasks("test")[0]})
        assert "\n" not in str(error.value)


@pytest.mark.extra
def test_the_search_expert_copes_with_places_side_by_side(games, tmp_path):
    """In official rooms several receptacles share a location: `go to` the second is not admissible at the first."""
    for number, path in enumerate(list(games)[::6]):
        text = pathlib.Path(path).read_text()
        moved = re.sub(r"loc_bar_([1-9][0-9]*)", lambda match: f"loc_bar_{(int(match[1]) + 1) // 2}", text)
        data = json.loads(moved)
        head, objects = data["pddl_problem"].split("(:objects", 1)
        objects = re.sub(r"  loc_bar_\d+ - location\n", "", objects)
        places = "".join(f"\n  {name} - location" for name in sorted(set(re.findall(r"loc_bar_\d+", objects))))
        data["pddl_problem"] = f"{head}(:objects{places}{objects}"
        file = tmp_path / str(number) / "game.tw-pddl"
        file.parent.mkdir()
        file.write_text(json.dumps(data))
        env = envs.make("alfworld", games=file)
        play(env, env.tasks("test")[0])
        assert env.success, file
