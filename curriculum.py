"""Task-specific curricula: a run's updates divided into stages (the paper's "curriculum learning").

A stage is a set of reset options and of tasks: which part of the task is played, which milestone is paid, how deep
the tasks go. DangerousTaxi learns to pick up, then to drop off, then the full trip with a reward at pickup; AutoExplore
takes shallow files before deep ones; ALFWorld pays milestones at first. Each
stage has a share of the updates, so that a curriculum means the same for a budget of 5 updates and of 500.

An environment of your own brings a curriculum as an attribute: `curriculum = [("easy", 0.3, {"level": 1}), ...]`.

    python curriculum.py --env taxi        # print the schedule
"""

import argparse
import dataclasses

import envs
from reflect_rl import add_common_options, env_factory, parse_args


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the updates
    options: dict = dataclasses.field(default_factory=dict)  # reset options of the environment
    max_depth: int | None = None  # only tasks whose `depth` is at most this

    def select(self, tasks):
        """The tasks of this stage: all, or those that are not too deep; never none."""
        if self.max_depth is None:
            return tasks
        shallowest = min(task["depth"] for task in tasks)
        return [task for task in tasks if task["depth"] <= max(self.max_depth, shallowest)]


def depth_stages(depths, merge_first=1, merge_tail=2):
    """Shallow tasks first: a stage for each depth limit, with equal shares; the first `merge_first` + 1 depths are one
    stage, and so are all from `merge_tail` on. Each stage keeps the shallower tasks, so that they are not forgotten."""
    limits = [depth for depth in sorted(set(depths)) if merge_first <= depth < merge_tail]
    stages = [Stage(f"depth <= {limit}", 1.0, max_depth=limit) for limit in limits]
    return (*stages, Stage("all", 1.0))


CURRICULA = {
    envs.DangerousTaxi: lambda env: (
        Stage("pickup", 0.05, {"mode": "pickup"}),
        Stage("dropoff", 0.15, {"mode": "dropoff"}),
        Stage("full", 0.8, {"mode": "full", "milestone": 0.5}),
    ),
    envs.ALFWorld: lambda env: (Stage("milestones", 0.5, {"milestone": 0.2}), Stage("all", 0.5)),
    envs.AutoExplore: lambda env: depth_stages(task["depth"] for task in env.tasks("train")),
}


def stages_of(env, on=True):
    """The stages of an environment; a single one, its default task, where it has no curriculum or it is off."""
    stages = (Stage("all", 1.0),)
    if on:
        stages = next((make(env) for cls, make in CURRICULA.items() if isinstance(env, cls)), stages)
        stages = tuple(Stage(*stage) for stage in getattr(env, "curriculum", ())) or stages
    return tuple(dataclasses.replace(s, options={**getattr(env, "training", {}), **s.options}) for s in stages)


def schedule(stages, updates):
    """The stage of every update, a list of `updates` stages in order.

    Shares are rounded where they end, but every stage gets at least one update; where there are fewer updates than
    stages, the first ones are left out, so the task itself is always among them.
    """
    stages = stages[-updates:] if updates else ()
    plan, done = [], 0.0
    for i, stage in enumerate(stages):
        done += stage.share / sum(stage.share for stage in stages)
        end = min(max(round(updates * done), i + 1), updates - (len(stages) - 1 - i))
        plan += [stage] * (end - len(plan))
    return plan


def main():
    parser = argparse.ArgumentParser(description="Print the curriculum of an environment.", allow_abbrev=False)
    add_common_options(parser)
    parser.add_argument("--updates", type=int, default=100, help="updates of the run (default: 100)")
    args = parse_args(parser)
    plan = schedule(stages_of(env_factory(args)()), args.updates)
    for stage in dict.fromkeys(stage.name for stage in plan):
        numbers = [i for i, s in enumerate(plan) if s.name == stage]
        print(f"updates {numbers[0] + 1:4}-{numbers[-1] + 1:<4} {stage:12} {plan[numbers[0]].options}")


if __name__ == "__main__":
    envs.run_main(main)
