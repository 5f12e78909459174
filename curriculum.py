"""Task-specific curricula: a run's updates divided into stages (the paper's "curriculum learning").

A stage is a set of reset options: which part of the task is played, and which milestone is paid. DangerousTaxi learns
to pick up, then to drop off, then the full trip with a reward at pickup. Each
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
    options: dict  # reset options of the environment


CURRICULA = {
    envs.DangerousTaxi: (
        Stage("pickup", 0.1, {"mode": "pickup"}),
        Stage("dropoff", 0.3, {"mode": "dropoff"}),
        Stage("full", 0.6, {"mode": "full", "milestone": 0.5}),
    ),
}


def stages_of(env, on=True):
    """The stages of an environment; a single one, its default task, where it has no curriculum or it is off."""
    if on:
        for cls, stages in CURRICULA.items():
            if isinstance(env, cls):
                return stages
        if getattr(env, "curriculum", None):
            return tuple(Stage(*stage) for stage in env.curriculum)
    return (Stage("all", 1.0, {}),)


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
