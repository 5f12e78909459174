"""The environment contract, DangerousTaxi against Gymnasium's Taxi-v3 and an independent map reader, and the way out
of every script: one line for what a user can mend."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import maps
import pytest

import envs
from envs import Env, UserError
from examples.key_door import KeyDoor
from plumbing.contract import check

MODES = ("full", "pickup", "dropoff")
SPLITS = ("train", "valid", "test", "final")
GUARDS = json.loads((Path(__file__).parent / "guards.json").read_text(encoding="utf-8"))


def start(task, **options):
    env = envs.make("taxi", **options)
    return env, *env.reset(seed=0, options={"task": task})


def walk(env, choose, **reset):
    """Every output of one episode: `(state, info)`, then `(state, reward, terminated, truncated, info)`."""
    state, info = env.reset(**reset)
    seen, over = [(state, dict(info))], False
    while not over:
        *rest, info = env.step(choose(info))
        seen.append((*rest, dict(info)))
        over = rest[2] or rest[3]
    return seen


def random_episode(name, seed):
    rng = random.Random(seed)
    return walk(envs.make(name), lambda info: rng.randrange(len(info["actions"])), seed=seed)


# ---------------------------------------------------------------------------------------------------------
# The contract, for every environment that ships


@pytest.mark.parametrize("name", envs.ENVS)
class TestContract:
    def test_resets_with_equal_seeds_are_equal(self, name):
        """Catches an environment that draws from anything but its own seeded RNG, and one that reseeds everybody's."""
        random.seed(1)
        first = [random_episode(name, seed) for seed in range(5)]
        random.seed(2)
        before = random.getstate()
        assert first == [random_episode(name, seed) for seed in range(5)]
        assert random.getstate() == before

    def test_splits_are_disjoint_fixed_and_json(self, name):
        """Catches train tasks in the test panel, splits drawn anew each time, tasks that cannot be written down."""
        splits = {split: [json.dumps(task) for task in envs.make(name).tasks(split)] for split in SPLITS}
        for split, tasks in splits.items():
            assert tasks and len(set(tasks)) == len(tasks), f"{split} is empty or lists a task twice"
            assert tasks == [json.dumps(task) for task in envs.make(name).tasks(split)], split
        everything = sum(splits.values(), [])
        assert len(set(everything)) == len(everything)
        with pytest.raises(envs.UserError, match="train"):
            envs.make(name).tasks("dev")

    def test_expert_succeeds(self, name):
        """Catches an expert that fails within the horizon: every teacher trajectory rests on it."""
        env = envs.make(name)
        for split in SPLITS:
            for task in env.tasks(split)[:20]:
                task = json.loads(json.dumps(task))
                *_, (_, _, terminated, truncated, info) = walk(
                    env, lambda info: env.expert_action(), seed=0, options={"task": task}
                )
                assert info["success"] and terminated and not truncated, f"expert fails on {task} of {split}"

    def test_states_and_actions_are_text(self, name):
        """Catches a list for a tuple (aliasing), non-text actions, a verdict that is no bool."""
        for state, *_, info in random_episode(name, 0):
            assert isinstance(state, str) and isinstance(info["actions"], tuple)
            assert all(isinstance(text, str) and text for text in info["actions"])
            assert info["success"] in (True, False)

    def test_misuse_is_refused(self, name):
        """Catches play beyond the end (rewards of a dead episode) and Python's negative indexing."""
        env = envs.make(name)
        _, info = env.reset(seed=0)
        for action in (-1, len(info["actions"])):
            with pytest.raises(IndexError):
                env.step(action)
        walk(env, lambda info: 0, seed=0)
        with pytest.raises(RuntimeError):
            env.step(0)


# ---------------------------------------------------------------------------------------------------------
# DangerousTaxi's dynamics


@pytest.mark.parametrize("split", SPLITS)
def test_taxi_tasks_are_those_of_before(split):
    """Catches another panel: no figure in the README could be compared with a new run."""
    tasks = json.dumps(envs.make("taxi").tasks(split))
    assert hashlib.sha256(tasks.encode()).hexdigest()[:16] == GUARDS[f"taxi tasks {split}"]


@pytest.mark.extra
def test_every_step_equals_gymnasium_but_for_danger():
    """All 500 states x 6 actions: catches a wall in the wrong place, a wrong encoding, reward or legality, a useless
    action that is not fatal, or a useful one that is."""
    # by class, because the id is Taxi-v4 in newer releases; P[state][action] = [(probability, next, reward, done)]
    table = pytest.importorskip("gymnasium.envs.toy_text.taxi").TaxiEnv().P
    for state in range(500):
        for action in range(6):
            [(_, after, reward, done)] = table[state][action]
            env, *_ = start(state)
            _, got, terminated, truncated, info = env.step(action)
            dead = after == state
            assert env.taxi_state == after and terminated == (done or dead) and not truncated
            assert info["success"] == done and got == pytest.approx(-0.5 if dead else reward / 20), (state, action)


@pytest.mark.parametrize("mode", MODES)
def test_expert_path_is_shortest(mode):
    """All 300 tasks, each mode, against the BFS of maps.py: catches a greedy expert that runs around walls, and a
    horizon at which the expert has no time for a few detours."""
    for split in SPLITS:
        for task in envs.make("taxi").tasks(split):
            env, state, _ = start(task, mode=mode)
            taxi, passenger, destination = maps.parse(state)
            needed = maps.steps_needed(taxi, passenger, destination)
            if mode == "pickup":
                needed = maps.distances(passenger)[taxi] + 1
            episode = walk(env, lambda info, env=env: env.expert_action(), options={"task": task})
            assert episode[-1][-1]["success"] and len(episode) - 1 == needed <= env.horizon - 6, (task, mode)


def test_useless_actions_are_fatal_from_the_first_step():
    """Every start x action against the walls of maps.py: catches forgiving walls, pickups and drop-offs anywhere."""
    for task in range(500):
        _, text, _ = start(task)
        taxi, passenger, _ = maps.parse(text)
        legal = {f"move {d}" for d in maps.DIRECTIONS if maps.neighbour(taxi, d)}
        if passenger == taxi:
            legal.add("pick up the passenger")
        if passenger is None and taxi in maps.PLACES.values():
            legal.add("drop off the passenger")
        for action, name in enumerate(maps.MENU):
            env, _, info = start(task)
            assert info["actions"] == maps.MENU
            _, reward, terminated, truncated, info = env.step(action)
            died = terminated and not info["success"]
            assert died == (name not in legal), f"state {task}, {name}"
            assert not died or (reward == -0.5 and not truncated)


def test_text_determines_the_state_and_the_helpers_agree():
    """Catches a map that hides something: the 400 states of a trip have 400 different texts (a taxi on D hides it, but
    then no D is visible), and maps.py reads them as Taxi-v3 encodes them. The teacher's helpers must say the same."""
    places, texts = list(maps.PLACES.values()), {}
    for state in range(500):
        row, col, passenger, destination = envs.taxi_decode(state)
        if passenger != destination:
            env, text, _ = start(state)
            texts[text] = state
            waiting = None if passenger == envs.ON_BOARD else places[passenger]
            assert maps.parse(text) == ((row, col), waiting, places[destination]), text
            assert set(env.blocked()) == maps.blocked((row, col))
            assert env.target() == (waiting or places[destination])
    assert len(texts) == 400
    assert envs.taxi_offset(1, 2, 3, 1) == "2 south and 1 west" and envs.taxi_offset(1, 2, 0, 2) == "1 north"
    assert envs.taxi_offset(1, 2, 1, 4) == "2 east" and envs.taxi_offset(1, 2, 1, 2) == "here"


def test_last_action_is_told():
    """Catches a state that says nothing of the move that led to it: then a mistake cannot be noticed."""
    env, state, _ = start(envs.taxi_encode(2, 2, 0, 3))
    assert state.splitlines()[-1] == "Last action: none."
    assert env.step(2)[0].splitlines()[-1] == "Last action: move east."
    assert "fatal" in env.step(5)[0].splitlines()[-1]


HOLDOUTS = [*[("starts", mode) for mode in MODES], ("pairs", "full"), ("pairs", "pickup")]


@pytest.mark.parametrize("holdout, mode", HOLDOUTS)
def test_starts_of_the_splits_are_disjoint(holdout, mode):
    """Catches leaks by mode: in `dropoff` the passenger's place is gone, and different tasks become one start; a pair
    of passenger and destination in two splits, a landmark that training never has at one end of a trip."""
    env = envs.make("taxi", mode=mode, holdout=holdout)
    starts = {split: {start(task, mode=mode)[1] for task in env.tasks(split)} for split in SPLITS}
    assert sum(map(len, starts.values())) == len(set.union(*starts.values())) == (100 if mode == "dropoff" else 300)
    assert len({env.cluster(task) for task in env.tasks("final")}) >= 40
    if holdout == "pairs":
        pairs = {split: {maps.parse(state)[1:] for state in starts[split]} for split in SPLITS}
        assert sum(map(len, pairs.values())) == len(set.union(*pairs.values())) == 12
        assert all(set(ends) == set(maps.PLACES.values()) for ends in zip(*pairs["train"], strict=True))


def test_milestone_is_paid_once():
    """Catches an agent that gets rich by picking the passenger up again and again."""
    env, *_ = start(envs.taxi_encode(0, 0, 0, 3), milestone=0.5)
    rewards = [env.step(action)[1] for action in (4, 5, 4, 5, 4)]  # up, down at the wrong place, up, down, up
    assert rewards == pytest.approx([-0.05 + 0.5, -0.05, -0.05, -0.05, -0.05])
    env.reset(options={"task": envs.taxi_encode(0, 0, 0, 3)})
    assert env.step(4)[1] == pytest.approx(0.45), "the milestone is due again in the next episode"


def test_modes_end_where_they_should():
    """Catches a curriculum stage whose goal is not its own."""
    env, *_ = start(envs.taxi_encode(0, 0, 0, 3), mode="pickup", milestone=0.5)
    _, reward, terminated, _, info = env.step(4)
    assert terminated and info["success"] and reward == 1.0
    env, state, _ = start(envs.taxi_encode(4, 3, 0, 3), mode="dropoff")
    assert "X" in state and "P" not in state and "T" not in state
    _, reward, terminated, _, info = env.step(5)
    assert terminated and info["success"] and reward == 1.0


def test_horizon_truncates_and_success_on_the_last_step_terminates():
    """Catches truncation reported as termination, and a success at the horizon lost to truncation."""
    env, *_ = start(envs.taxi_encode(2, 2, 0, 3), horizon=3)
    ends = [env.step(action)[2:4] for action in (2, 3, 2)]
    assert ends == [(False, False), (False, False), (False, True)]
    env, *_ = start(envs.taxi_encode(0, 1, 0, 3), horizon=2, mode="pickup")
    env.step(3)
    _, _, terminated, truncated, info = env.step(4)
    assert (terminated, truncated, info["success"]) == (True, False, True)


@pytest.mark.parametrize("options", [{"task": 500}, {"task": -1}, {"task": "R"}, {"task": 1, "mode": "fly"}])
def test_bad_reset_options_are_user_errors(options):
    with pytest.raises(envs.UserError):
        envs.make("taxi").reset(options=options)


# ---------------------------------------------------------------------------------------------------------
# An environment of one's own, and how a script ends

MINE = """
import envs
class Mine(envs.Env):
    def __init__(self, size=3, more=None): self.size = size + (more or 0)
    def tasks(self, split): {body}
def call(): open("called", "w")
"""


def play(folder, *options, code, script=envs.__file__, answers="", out=subprocess.PIPE, **environment):
    """`python envs.py` in a process of its own; what it printed on stdout and stderr."""
    streams = {"input": answers, "stdout": out, "stderr": subprocess.PIPE, "text": True, "env": environment or None}
    done = subprocess.run([sys.executable, script, *options], cwd=folder, **streams)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout, done.stderr


def test_the_contract_has_defaults_and_names_what_is_missing():
    """Catches a traceback that ends in a bare NotImplementedError, and hooks that are found by luck."""

    class Half(envs.Env):
        def step(self, action):
            return None

    half = Half()
    missing = {"reset": (), "tasks": ("train",), "expert_action": (), "reflection": (True,)}
    for method, arguments in missing.items():
        with pytest.raises(envs.UserError, match=rf"Half needs a method {method}\(\)"):
            getattr(half, method)(*arguments)
    assert half.groups(0) == () and half.mistakes() is None


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("taxy", {}, "taxi"),
        ("no_such_module:Env", {}, "no_such_module"),
        ("maps:Room", {}, "Room is not a subclass of envs.Env"),
        ("os:system", {}, "system is not a subclass of envs.Env"),
        ("maps:", {}, "unknown environment"),
        ("taxi", {"size": 7}, "size"),
        ("taxi", {"holdout": "maps"}, "holdout 'maps'.*: starts, or pairs"),
        ("taxi", {"horizon": "far"}, "must be a number, not 'far'"),
    ],
)
def test_what_cannot_be_made_is_a_user_error(name, options, words):
    """Catches a traceback for a typo; the message names what is wrong or what there is."""
    with pytest.raises(envs.UserError, match=words):
        envs.make(name, **options)


def test_only_subclasses_are_called(tmp_path):
    """Catches a function that is called because it was named: `--env os:system` ran a command."""
    (tmp_path / "mine.py").write_text(MINE.format(body="return [1]"))
    _, err = play(tmp_path, "--env", "mine:call", code=2)
    assert err.startswith("error: cannot load") and not (tmp_path / "called").exists()


def test_the_current_directory_comes_last(tmp_path):
    """Catches a file beside the user's data that takes the place of an installed package."""
    (tmp_path / "mine.py").write_text("import pytest\n" + MINE.format(body="raise envs.UserError(pytest.__version__)"))
    (tmp_path / "pytest.py").write_text("raise SystemExit('the wrong one')")
    assert play(tmp_path, "--env", "mine:Mine", code=2)[1] == f"error: {pytest.__version__}\n"


@pytest.mark.parametrize(
    "body, shown",
    [
        ("raise envs.UserError('not\\nmine')", "error: not mine\n"),  # also catches two copies of `UserError`
        ("open('nowhere')", "Traceback"),
        ("raise BrokenPipeError", "Traceback"),
        ("return len(3)", "Traceback"),
    ],
)
def test_errors_of_an_own_environment_keep_their_traceback(body, shown, tmp_path):
    (tmp_path / "mine.py").write_text(MINE.format(body=body))
    _, err = play(tmp_path, "--env", "mine:Mine", code=2 if shown.startswith("error") else 1)
    assert err == shown or (err.startswith(shown) and "mine.py" in err)
    _, err = play(tmp_path, "--env", "mine:Mine", "--env-option", "more=x", code=1)
    assert err.startswith("Traceback") and "TypeError" in err, "no wrong option, but a mistake in the constructor"


def test_a_module_that_an_own_environment_misses_is_shown_with_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    assert "Traceback" in play(tmp_path, "--env", "mine:Mine", code=1)[1]


def test_an_os_error_is_one_line_and_an_interrupt_ends_with_130(capsys):
    def run(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as end:
            envs.run_main(main)
        return end.value.code, capsys.readouterr().err

    assert run(PermissionError(13, "Permission denied", "runs")) == (2, "error: [Errno 13] Permission denied: 'runs'\n")
    assert run(OSError("two\nlines")) == (2, "error: two lines\n")
    assert run(KeyboardInterrupt()) == (130, "interrupted\n")


def test_a_closed_pipe_is_quiet(tmp_path):
    """Catches the traceback of `| head -1`, while a script prints and when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    assert play(tmp_path, code=1, answers="0\n" * 40, out=writer) == (None, "")
    (tmp_path / "short.py").write_text("import envs\nenvs.run_main(lambda: print('x'))")
    root = str(Path(envs.__file__).parent)
    assert play(tmp_path, code=1, script="short.py", out=writer, PYTHONPATH=root) == (None, "")
    os.close(writer)


def test_an_ascii_terminal_shows_escapes(tmp_path):
    """Catches a crash where a question has an accent, or the name of a file is not UTF-8."""
    (tmp_path / "mine.py").write_text(MINE.format(body="print('caf\\u00e9 \\udce9'); raise envs.UserError('\\udce9')"))
    out, err = play(tmp_path, "--env", "mine:Mine", code=2, PYTHONIOENCODING="ascii")
    assert out == "caf\\xe9 \\udce9\n" and err == "error: \\udce9\n"


def test_play_by_hand(tmp_path):
    """Catches options that do not reach the environment, and answers that end in a traceback."""
    out, _ = play(tmp_path, "--env-option", "mode=pickup", "--seed", "2", code=0, answers="e\nx\n77\n\n3\nq\n")
    assert "the expert would: " in out and out.count("please type a number from 0 to 5") == 3
    assert "unknown mode 'fly'" in play(tmp_path, "--env-option", "mode=fly", code=2)[1]
    assert "unknown split" in play(tmp_path, "--split", "dev", code=2)[1]
    for wrong in ("--no-such-option", "--see=1", "--env-option=mode", "--env-option==3", "--seed=one"):
        assert wrong.split("=")[0] in play(tmp_path, wrong, code=2)[1].splitlines()[-1]
    (tmp_path / "mine.py").write_text(MINE.format(body="return []"))
    assert "no tasks in its train split" in play(tmp_path, "--env", "mine:Mine", code=2)[1]


# ---------------------------------------------------------------------------------------------------------
# An environment of one's own, checked before anything is trained


def step(*result):
    return lambda self, action: result


INFO = {"actions": ("a",), "success": False}


@pytest.mark.parametrize(
    "violation, words",
    [
        ({"info": lambda self, success: {"success": success}}, "info must have 'actions'"),
        ({"info": lambda self, success: {"actions": ("a",)}}, "info must have 'success'"),
        ({"info": lambda self, success: {"actions": (), "success": success}}, "at least one"),
        ({"expert_action": lambda self: 7}, r"expert_action\(\) is 7, and there are 4 actions"),
        ({"state": lambda self: 3}, "a state must be a text that is not empty, not 3"),
        ({"state": lambda self: str(random.random())}, "two resets with one seed"),
        ({"tasks": lambda self, split: [[0, 1, 2]]}, r"task \[0, 1, 2\] is in valid and in train"),
        ({"tasks": lambda self, split: []}, r"tasks\('train'\) must be a list"),
        ({"tasks": lambda self, split: [object()]}, "a task must be a JSON value"),
        ({"tasks": Env.tasks}, r"needs a method tasks\(\)"),
        ({"step": step("x", 0.0, False, False, INFO)}, "has not ended after 1000 steps"),
        ({"step": step("x", None, True, False, INFO)}, "a reward must be a number, not None"),
        ({"step": step("x", 0.0, True, INFO)}, r"step\(\) gave"),
        ({"step": step("x", 0.0, True, False, None)}, "info must have 'actions'"),
    ],
)
def test_a_violation_of_the_contract_is_named_before_the_training(violation, words):
    """Catches an environment that fails after an hour of SFT, or trains on what its author did not mean."""
    check(KeyDoor())
    with pytest.raises(UserError, match=words):
        check(type("Mine", (KeyDoor,), violation)())
