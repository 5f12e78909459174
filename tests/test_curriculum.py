"""Stages and schedules, for budgets from nothing to plenty."""

import pytest
from corridor import Corridor

import curriculum
import envs
from curriculum import Stage

TAXI = curriculum.stages_of(envs.make("taxi"))
SHARES = {
    "taxi": TAXI,
    "even": [Stage(str(i), 0.25, {}) for i in range(4)],
    "steep": [Stage("a", 0.001, {}), Stage("b", 0.001, {}), Stage("c", 0.998, {})],
    "one": [Stage("all", 1.0, {})],
    "in percent": [Stage("a", 30, {}), Stage("b", 70, {})],
}


@pytest.mark.parametrize("updates", [*range(1, 13), 100, 997, 1000])
@pytest.mark.parametrize("name", SHARES)
def test_schedule(name, updates):
    """Catches triggers that all round to 0 in a tiny budget (every stage gets an update if there are enough, the last
    one always does), stages out of order, shares that are starts or not normalised."""
    stages = SHARES[name]
    plan, total = curriculum.schedule(stages, updates), sum(stage.share for stage in stages)
    order = [stages.index(stage) for stage in plan]
    assert len(plan) == updates and order == sorted(order)
    assert set(order) == set(range(len(stages))[-updates:]), "as many stages as updates, the task itself among them"
    if updates == 1000:
        for stage in stages:
            assert abs(plan.count(stage) - 1000 * stage.share / total) <= 1


def test_taxi_goes_from_easy_to_full():
    """Catches a last stage that is not the task, a milestone that is paid where it should not be, an ablation that
    still has one."""
    env = envs.make("taxi")
    for stage, mode in zip(TAXI, ("pickup", "dropoff", "full"), strict=True):
        env.reset(options={**stage.options, "task": envs.taxi_encode(0, 0, 0, 3)})
        assert env.mode == stage.options["mode"] == mode
    assert env.step(4)[1] > 0, "the full stage pays a milestone at pickup"
    given = curriculum.stages_of(env, given={"mode": "pickup"})
    assert [stage.options for stage in given] == [{}, {}, {"milestone": 0.5}], "the command line wins"
    [stage] = curriculum.stages_of(env, on=False)
    assert stage.options == env.training == {} and stage.select([1, 2]) == [1, 2]


@pytest.mark.parametrize("name", envs.ENVS)
def test_without_milestones_the_stages_are_the_same(name):
    """Catches an ablation that does nothing, or that takes more than the milestone."""
    stages = curriculum.stages_of(envs.make(name))
    paid = [stage.options.pop("milestone", None) for stage in stages]
    assert curriculum.stages_of(envs.make(name), milestone=False) == stages
    assert any(paid) == (name != "autoexplore")


def test_the_authors_stages_are_thirds():
    """Catches our own shares under their name, a pickup that pays less than the trip, and a game of which they have no
    stages that has none at all."""
    env = envs.make("taxi")
    stages = curriculum.stages_of(env, authors=True)
    names = [stage.name for stage in curriculum.schedule(stages, 9)]
    assert names == sum(([name] * 3 for name in ("pickup", "dropoff", "full")), [])
    env.reset(options={**stages[2].options, "task": envs.taxi_encode(0, 0, 0, 3)})
    assert env.step(4)[1] == pytest.approx(1.0)
    for name in ("autoexplore", "alfworld"):
        assert curriculum.stages_of(envs.make(name), authors=True) == curriculum.stages_of(envs.make(name))


def test_shallow_tasks_come_first():
    """Catches a depth that is ignored, a task without depth that breaks, a stage without tasks."""
    stages = curriculum.stages_of(envs.make("autoexplore"))
    shallow, everything = [{"depth": 1}, {}, {"depth": 0}], [{"depth": 2}, {"depth": 3}]
    assert stages[0].select(everything + shallow) == shallow and stages[0].select(everything) == everything
    assert stages[1].select(everything + shallow) == everything + shallow


def test_an_environment_brings_its_curriculum(monkeypatch):
    """Catches a curriculum of one's own, or training options, that are ignored, or that win over a stage's options."""
    monkeypatch.setattr(Corridor, "training", {"noise": 1, "near": False})
    stages = curriculum.stages_of(Corridor())
    assert [(s.name, s.share) for s in stages] == [("near", 0.5), ("all", 0.5)]
    assert [s.options for s in stages] == [{"noise": 1, "near": True}, {"noise": 1, "near": False}]
    assert [s.options for s in curriculum.stages_of(Corridor(), on=False)] == [{"noise": 1, "near": False}]
    monkeypatch.setattr(Corridor, "curriculum", ())
    assert [s.name for s in curriculum.stages_of(Corridor())] == ["all"]


def test_the_command_line_wins_over_the_stages():
    """Catches `--env-option mode=pickup` that SFT and evaluation follow and RL does not."""
    stages = curriculum.stages_of(envs.DangerousTaxi(mode="pickup"), given={"mode": "pickup"})
    assert all("mode" not in stage.options for stage in stages)
    assert stages[-1].options == {"milestone": 0.5}, "what was not given stays the stage's"
