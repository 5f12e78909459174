"""The environment contract, and DangerousTaxi against Gymnasium's Taxi-v3 and an independent map reader."""

import json
import random

import maps
import pytest

import envs

MODES = ("full", "pickup", "dropoff")
SPLITS = ("train", "valid", "test")


def start(task, **options):
    env = envs.make("taxi", **options)
    return env, *env.reset(seed=0, options={"task": task})


def random_episode(name, seed):
    """Every output of one random episode."""
    env, rng = envs.make(name), random.Random(seed)
    state, info = env.reset(seed=seed)
    seen, over = [(state, info)], False
    while not over:
        *rest, info = env.step(rng.randrange(len(info["actions"])))
        seen.append((*rest, dict(info)))
        over = rest[2] or rest[3]
    return seen


# ---------------------------------------------------------------------------------------------------------
# The contract, for every environment that ships


@pytest.mark.parametrize("name", envs.ENVS)
class TestContract:
    def test_resets_with_equal_seeds_are_equal(self, name):
        """Catches an environment that draws from anything but its own seeded RNG."""
        random.seed(1)
        first = [random_episode(name, seed) for seed in range(5)]
        random.seed(2)
        assert first == [random_episode(name, seed) for seed in range(5)]

    def test_leaves_the_process_wide_rng_alone(self, name):
        """Catches `random.seed()` inside an environment, which makes every other sampler repeat itself."""
        random.seed(7)
        before = random.getstate()
        random_episode(name, 3)
        assert random.getstate() == before

    def test_splits_are_disjoint_fixed_and_json(self, name):
        """Catches train tasks in the test panel, splits drawn anew each time, tasks that cannot be written down."""
        splits = {split: [json.dumps(task) for task in envs.make(name).tasks(split)] for split in SPLITS}
        assert all(splits.values()), "a split is empty"
        for split, tasks in splits.items():
            assert len(set(tasks)) == len(tasks), f"{split} lists a task twice"
            assert tasks == [json.dumps(task) for task in envs.make(name).tasks(split)], (
                f"{split} changes from call to call"
            )
        assert not set(splits["train"]) & set(splits["valid"]) and not set(splits["test"]) & set(
            splits["train"] + splits["valid"]
        )

    def test_expert_succeeds(self, name):
        """Catches an expert that fails within the horizon: every teacher trajectory rests on it."""
        env = envs.make(name)
        for split in SPLITS:
            for task in env.tasks(split)[:20]:
                _, info = env.reset(seed=0, options={"task": json.loads(json.dumps(task))})
                over = False
                while not over:
                    _, _, terminated, truncated, info = env.step(env.expert_action())
                    over = terminated or truncated
                assert info["success"] and terminated and not truncated, f"expert fails on {task} of {split}"

    def test_states_and_actions_are_text(self, name):
        """Catches a list for a tuple (aliasing), non-text actions, a verdict that is no bool."""
        for *_, state_or_flag, info in random_episode(name, 0):
            assert isinstance(info["actions"], tuple) and all(
                isinstance(text, str) and text for text in info["actions"]
            )
            assert info["success"] in (True, False), state_or_flag

    def test_misuse_is_refused(self, name):
        """Catches play beyond the end (rewards of a dead episode) and Python's negative indexing."""
        env = envs.make(name)
        _, info = env.reset(seed=0)
        for action in (-1, len(info["actions"])):
            with pytest.raises(IndexError):
                env.step(action)
        over = False
        while not over:
            _, _, terminated, truncated, _ = env.step(0)
            over = terminated or truncated
        with pytest.raises(RuntimeError):
            env.step(0)


# ---------------------------------------------------------------------------------------------------------
# DangerousTaxi's dynamics


def gymnasium_table():
    """`P[state][action] = [(probability, next state, reward, done)]`; by class, for the id is Taxi-v4 in newer
    releases."""
    return pytest.importorskip("gymnasium.envs.toy_text.taxi").TaxiEnv().P


@pytest.mark.extra
def test_transitions_equal_gymnasium():
    """All 500 states x 6 actions: catches a wall in the wrong place, a wrong encoding, a wrong reward, a wrong
    legality."""
    table = gymnasium_table()
    for state in range(500):
        for action in range(6):
            [(_, after, reward, done)] = table[state][action]
            assert envs.taxi_transition(state, action) == (after, reward, done), (state, action)


@pytest.mark.extra
def test_steps_equal_gymnasium_but_for_danger():
    """All 500 states x 6 actions through `step`: catches a useless action that is not fatal, or a useful one that
    is."""
    table = gymnasium_table()
    for state in range(500):
        for action in range(6):
            [(_, after, reward, done)] = table[state][action]
            env, *_ = start(state)
            _, got, terminated, truncated, info = env.step(action)
            dead = after == state
            assert env.taxi_state == after and terminated == (done or dead) and not truncated
            assert info["success"] == done and got == pytest.approx(-0.5 if dead else reward / 20), (state, action)


@pytest.mark.extra
def test_expert_equals_bfs_on_gymnasium():
    """Catches an expert that walks a detour: its length equals a breadth-first search over Gymnasium's own table."""
    table = gymnasium_table()
    before = {state: [] for state in range(500)}
    frontier, needed = set(), {}
    for state in range(500):
        for action in range(6):
            [(_, after, _, done)] = table[state][action]
            before[after].append(state)
            if done:
                frontier.add(state)
    while frontier:
        depth = max(needed.values(), default=0) + 1
        needed |= dict.fromkeys(frontier, depth)
        frontier = {s for after in frontier for s in before[after]} - needed.keys()
    for split in SPLITS:
        for task in envs.make("taxi").tasks(split):
            assert expert_length(task, "full") == needed[task], task


def expert_length(task, mode):
    env, _, info = start(task, mode=mode)
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, info = env.step(env.expert_action())
        steps, over = steps + 1, terminated or truncated
    assert info["success"]
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_expert_path_is_shortest(mode):
    """All 300 tasks, each mode, against the BFS of maps.py: catches a greedy expert that runs around walls."""
    for split in SPLITS:
        for task in envs.make("taxi").tasks(split):
            _, state, _ = start(task, mode=mode)
            taxi, passenger, destination = maps.parse(state)
            needed = (
                maps.distances(passenger)[taxi] + 1
                if mode == "pickup"
                else maps.steps_needed(taxi, passenger, destination)
            )
            assert expert_length(task, mode) == needed, (task, mode)


def test_useless_actions_are_fatal_from_the_first_step():
    """Every start x action against the walls of maps.py: catches forgiving walls, pickups anywhere, drop-offs
    anywhere."""
    for task in range(500):
        _, text, _ = start(task)
        taxi, passenger, _ = maps.parse(text)
        open_moves = {f"move {d}" for d in maps.DIRECTIONS if maps.neighbour(taxi, d)}
        legal = open_moves | ({"pick up the passenger"} if passenger == taxi else set())
        if passenger is None and taxi in maps.PLACES.values():
            legal.add("drop off the passenger")
        for action, name in enumerate(maps.MENU):
            env, _, info = start(task)
            assert info["actions"] == maps.MENU
            _, reward, terminated, truncated, info = env.step(action)
            died = terminated and not info["success"]
            assert died == (name not in legal), f"state {task}, {name}"
            assert not died or (reward == -0.5 and not truncated)


def test_text_determines_the_state():
    """Catches a map that hides something: the 400 states of a trip have 400 different texts (a taxi on D hides it, but
    then no D is visible), and maps.py reads them as Taxi-v3 encodes them."""
    places = list(maps.PLACES.values())
    trips = [s for s in range(500) if envs.taxi_decode(s)[2] != envs.taxi_decode(s)[3]]
    texts = {start(state)[1]: state for state in trips}
    assert len(trips) == 400 and len(texts) == 400
    for text, state in texts.items():
        row, col, passenger, destination = state // 100, state // 20 % 5, state // 4 % 5, state % 4
        assert maps.parse(text) == ((row, col), None if passenger == 4 else places[passenger], places[destination]), (
            text
        )


def test_last_action_is_told():
    """Catches a state that says nothing of the move that led to it: then a mistake cannot be noticed."""
    env, state, _ = start(envs.taxi_encode(2, 2, 0, 3))
    assert state.splitlines()[-1] == "Last action: none."
    assert env.step(2)[0].splitlines()[-1] == "Last action: move east."
    assert "fatal" in env.step(5)[0].splitlines()[-1]


@pytest.mark.parametrize("mode", MODES)
def test_starts_of_the_splits_are_disjoint(mode):
    """Catches leaks by mode: in `dropoff` the passenger's place is gone, and different tasks become one start."""
    starts = [{start(task, mode=mode)[1] for task in envs.make("taxi").tasks(split)} for split in SPLITS]
    assert not starts[0] & starts[1] and not starts[0] & starts[2] and not starts[1] & starts[2]


# ---------------------------------------------------------------------------------------------------------
# Rewards, modes, ends


def test_milestone_is_paid_once():
    """Catches an agent that gets rich by picking the passenger up again and again."""
    env, *_ = start(envs.taxi_encode(0, 0, 0, 3), milestone=0.5)
    rewards = [env.step(action)[1] for action in (4, 5, 4, 5, 4)]  # up, down at the wrong place, up, down, up
    assert rewards == pytest.approx([-0.05 + 0.5, -0.05, -0.05, -0.05, -0.05])
    env.reset(options={"task": envs.taxi_encode(0, 0, 0, 3)})
    assert env.step(4)[1] == pytest.approx(0.45), "the milestone is due again in the next episode"


def test_pickup_mode_ends_at_pickup():
    """Catches a curriculum stage whose goal is not its own."""
    env, *_ = start(envs.taxi_encode(0, 0, 0, 3), mode="pickup", milestone=0.5)
    _, reward, terminated, _, info = env.step(4)
    assert terminated and info["success"] and reward == 1.0


def test_dropoff_mode_starts_on_board():
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


def test_horizon_leaves_room_for_every_task():
    """Catches a horizon at which even the expert runs out of time after a few detours."""
    assert (
        max(expert_length(task, "full") for split in SPLITS for task in envs.make("taxi").tasks(split)) + 6
        <= envs.make("taxi").horizon
    )


def test_facts_are_true():
    """Catches a base corpus that teaches wrong coordinates: facts against the independent parser, at every start."""
    for task in range(0, 500, 7):
        env, state, _ = start(task)
        taxi, passenger, destination = maps.parse(state)
        facts = {beginning.strip(): rest.strip() for beginning, rest in env.describe()}
        assert facts["The taxi is at row"] == f"{taxi[0]} column {taxi[1]}."
        assert ("on board." in facts.values(), "waiting." in facts.values()) == (
            passenger is None,
            passenger is not None,
        )
        if envs.taxi_decode(task)[2] != envs.taxi_decode(task)[3]:  # else P covers D
            assert facts["The destination is at row"] == f"{destination[0]} column {destination[1]}."
        assert set(facts["Blocked:"].strip(".").split(", ")) == (maps.blocked(taxi) or {"nothing"})
        for direction in maps.DIRECTIONS:
            to = maps.neighbour(taxi, direction)
            assert facts[f"To move {direction}"] == (f"leads to row {to[0]} column {to[1]}." if to else "is blocked.")


def test_facts_about_the_last_action_are_true():
    """Catches a fact about the cell before that is about the cell now, and one that is there where nothing moved."""
    for task in envs.make("taxi").tasks("train")[:40]:
        env, state, info = start(task)
        before, rng = maps.parse(state), random.Random(task)
        for _ in range(12):
            action = rng.randrange(6)
            state, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
            facts = {beginning: rest.strip() for beginning, rest in env.describe()}
            now = maps.parse(state)
            assert facts["Before it the taxi was at row"] == f"{before[0][0]} column {before[0][1]}."
            assert facts["The last action was"] == f"{info['actions'][action]}."
            led = facts.get(f"To {info['actions'][action]} led")
            assert (led is None) == (action > 3)
            if led:
                goal = now[1] or now[2]
                distance = [abs(cell[0] - goal[0]) + abs(cell[1] - goal[1]) for cell in (before[0], now[0])]
                assert led.startswith("towards") == (distance[1] < distance[0])
            before = now


# ---------------------------------------------------------------------------------------------------------
# Making


def test_bring_your_own_environment():
    env = envs.make("corridor:Corridor", length=3)
    assert env.reset(options={"task": [0, 2]})[0].startswith("at 0, goal 2")


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("taxy", {}, "taxi"),
        ("no_such_module:Env", {}, "no_such_module"),
        ("corridor:Room", {}, "Room"),
        ("taxi", {"size": 7}, "size"),
    ],
)
def test_what_cannot_be_made_is_a_user_error(name, options, words):
    """Catches a traceback for a typo; the message names what is wrong or what there is."""
    with pytest.raises(envs.UserError, match=words):
        envs.make(name, **options)


@pytest.mark.parametrize("options", [{"task": 500}, {"task": -1}, {"task": "R"}, {"task": 1, "mode": "fly"}])
def test_bad_reset_options_are_user_errors(options):
    with pytest.raises(envs.UserError):
        envs.make("taxi").reset(options=options)


def test_unknown_split_is_a_user_error():
    with pytest.raises(envs.UserError, match="train"):
        envs.make("taxi").tasks("dev")
