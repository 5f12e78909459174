"""Gymnasium's environments as text (examples/gym_text.py)."""

import pytest

import envs
import negatives
from envs import Env, UserError
from plumbing.contract import check

pytestmark = pytest.mark.extra
gymnasium = pytest.importorskip("gymnasium")
TABLES = [("FrozenLake-v1", {"is_slippery": False}, 6), ("CliffWalking-v1", {}, 13), ("Taxi-v4", {}, None)]


@pytest.mark.parametrize("name, options, steps", TABLES)
def test_environments_with_a_table_have_an_expert_and_a_teacher(name, options, steps):
    """Catches wrong action names or success, colours in the state, an expert that does not arrive, a way longer than
    the shortest, and records that cannot be made."""
    env = envs.make(f"gym:{name}", **options)
    check(env)
    for task in env.tasks("test")[:10]:
        state, info = env.reset(seed=0, options={"task": task})
        length, over = 0, False
        while not over:
            assert "\x1b" not in state and "Last action" in state
            state, _, terminated, truncated, info = env.step(env.expert_action())
            length, over = length + 1, terminated or truncated
        assert info["success"] and length == (steps or length), task
    records, failed = negatives.make_records(lambda: env, 4, 0.5, 0)
    assert failed == 0 and any("was a mistake" in record.reflection for record in records)


def test_what_the_states_show():
    env = envs.make("gym:FrozenLake-v1", is_slippery=False)
    assert env.reset(seed=0, options={"task": 0})[0] == "[S]FFF\nFHFH\nFFFH\nHFFG\nLast action: none."
    assert env.reflection(False) == "Dangerous here: nothing."
    assert env.step(1)[0] == "SFFF\n[F]HFH\nFFFH\nHFFG\nLast action: go down."
    assert env.reflection(True) == "Dangerous here: go right. To go down was a mistake."
    state, _, terminated, _, info = env.step(2)
    assert terminated and not info["success"]  # into the hole


def test_chance_is_the_seeds_and_an_environment_without_a_table_has_no_expert():
    env = envs.make("gym:Blackjack-v1")
    check(env)
    assert type(env).expert_action is Env.expert_action and env.names == ("stick", "hit")
    first = [env.reset(seed=seed, options={"task": task})[0] for task in range(5) for seed in range(5)]
    assert first == [env.reset(seed=seed, options={"task": task})[0] for task in range(5) for seed in range(5)]
    assert len(set(first)) > 10


@pytest.mark.parametrize("name, words", [("NoSuch-v0", "cannot make"), ("Pendulum-v1", "no discrete actions")])
def test_what_is_no_such_environment_is_one_line(name, words):
    with pytest.raises(UserError, match=words):
        envs.make(f"gym:{name}")
