"""Task-specific curricula: the updates of a run divided into stages (the paper's "curriculum learning").

A stage is a share of the updates with reset options of its own, or with easier tasks only: DangerousTaxi learns to
pick up, then to drop off, then the whole trip; AutoExplore begins with shallow files. An environment of your own brings
its stages as an attribute: `curriculum = [("easy", 0.3, {"level": 1}), ("hard", 0.7, {"level": 2})]`.

    python curriculum.py --env taxi        # print the schedule
"""

import argparse
import dataclasses

import envs
from plumbing.options import COMMON, add_options, env_factory, parse_args

CURRICULA = {  # the stages as they are written for an environment of your own
    envs.DangerousTaxi: [
        ("pickup", 0.05, {"mode": "pickup"}),
        ("dropoff", 0.15, {"mode": "dropoff"}),
        ("full", 0.8, {"mode": "full", "milestone": 0.5}),
    ],
    envs.AutoExplore: [("depth <= 1", 0.5, {}, 1), ("all", 0.5)],
    envs.ALFWorld: [("milestones", 0.5, {"milestone": 0.2}), ("all", 0.5)],
}
AUTHORS = {  # those of the authors' code, for `--algo paper`: thirds, and a pickup pays as much as the trip
    envs.DangerousTaxi: [
        ("pickup", 1 / 3, {"mode": "pickup"}),
        ("dropoff", 1 / 3, {"mode": "dropoff"}),
        ("full", 1 / 3, {"mode": "full", "milestone": 1.05}),
    ],
}


@dataclasses.dataclass
class Stage:
    name: str
    share: float  # of the updates
    options: dict = dataclasses.field(default_factory=dict)  # of the environment's reset
    max_depth: int | None = None  # only tasks that are not deeper

    def select(self, tasks):
        """The tasks of this stage; all of them where none is shallow enough."""
        shallow = [task for task in tasks if self.max_depth is None or task.get("depth", 0) <= self.max_depth]
        return shallow or tasks


def stages_of(env, on=True, milestone=True, given=(), authors=False):
    """The stages of an environment; one, the task itself, where it has no curriculum or `on` is false.

    Each also has the environment's own training options (augmentation). The command line wins: no stage changes what
    is `given` to the environment's constructor, such as `mode`. Without `milestone` no stage pays for a sub-goal.
    `authors`: the stages of their code, where they are others.
    """
    table = env.curriculum if on else [("all", 1.0)]
    for cls, built_in in (CURRICULA | (AUTHORS if authors else {})).items():
        if isinstance(env, cls):
            table = table or built_in
    stages = [Stage(*row) for row in table or [("all", 1.0)]]
    for stage in stages:
        stage.options = env.training | stage.options
        for name in [*given, *([] if milestone else ["milestone"])]:
            stage.options.pop(name, None)
    return stages


def schedule(stages, updates):
    """The stage of every update, a list. Every stage has at least one update.

    With fewer updates than stages the first stages are left out, so that the task itself is always trained.
    """
    stages = stages[-updates:]
    total, plan, done = sum(stage.share for stage in stages), [], 0.0
    for i, stage in enumerate(stages, 1):
        done += stage.share / total
        later = len(stages) - i  # stages that still need an update each
        end = min(max(round(updates * done), len(plan) + 1), updates - later)
        plan += [stage] * (end - len(plan))
    return plan


def main():
    parser = argparse.ArgumentParser(description="Print the curriculum of an environment.")
    add_options(parser, COMMON, {"updates": (100, "updates of the run", 1)})
    args = parse_args(parser)
    plan = schedule(stages_of(env_factory(args)(), given=dict(args.env_option)), args.updates)
    for first, stage in enumerate(plan, 1):
        if first == 1 or stage is not plan[first - 2]:
            print(f"updates {first:4}-{first + plan.count(stage) - 1:<4} {stage.name:12} {stage.options}")


if __name__ == "__main__":
    envs.run_main(main)
