"""Stages and schedules, for budgets from nothing to plenty."""

import pytest

import curriculum
import envs
from curriculum import Stage

TAXI = curriculum.stages_of(envs.make("taxi"))
SHARES = {
    "taxi": TAXI,
    "even": tuple(Stage(str(i), 0.25, {}) for i in range(4)),
    "steep": (Stage("a", 0.001, {}), Stage("b", 0.001, {}), Stage("c", 0.998, {})),
    "one": (Stage("all", 1.0, {}),),
    "in percent": (Stage("a", 30, {}), Stage("b", 70, {})),
}


@pytest.mark.parametrize("updates", [*range(13), 100, 997])
@pytest.mark.parametrize("name", SHARES)
def test_schedule(name, updates):
    """Catches triggers that all round to 0 in a tiny budget: every stage gets an update if there are enough, the last
    one always does; stages come in order, and fill the budget."""
    stages = SHARES[name]
    plan = curriculum.schedule(stages, updates)
    assert len(plan) == updates
    order = [stages.index(stage) for stage in plan]
    assert order == sorted(order)
    assert not updates or plan[-1] is stages[-1], "the task itself is never trained on"
    if updates >= len(stages):
        assert set(order) == set(range(len(stages))), "a stage was left out"
    else:
        assert len(set(order)) == updates, "as many stages as updates"


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_kept(name):
    """Catches shares that are starts, or not normalised: of 1000 updates each stage gets its part."""
    stages = SHARES[name]
    plan, total = curriculum.schedule(stages, 1000), sum(stage.share for stage in stages)
    for stage in stages:
        assert abs(plan.count(stage) - 1000 * stage.share / total) <= 1


def test_taxi_goes_from_easy_to_full():
    """Catches a last stage that is not the task, and a milestone that is paid where it should not be."""
    assert [stage.options["mode"] for stage in TAXI] == ["pickup", "dropoff", "full"]
    env = envs.make("taxi")
    for stage in TAXI:
        env.reset(options={**stage.options, "task": envs.taxi_encode(0, 0, 0, 3)})
        assert env.mode == stage.options["mode"]
    assert env.step(4)[1] > 0, "the full stage pays a milestone at pickup"


def test_off_is_the_default_task():
    [stage] = curriculum.stages_of(envs.make("taxi"), on=False)
    assert stage.options == {} and curriculum.schedule([stage], 5) == [stage] * 5


def test_an_environment_brings_its_curriculum():
    stages = curriculum.stages_of(envs.make("corridor:Corridor"))
    assert [(s.name, s.share, s.options) for s in stages] == [("near", 0.5, {"near": True}), ("all", 0.5, {})]
    assert len(curriculum.stages_of(object())) == 1
