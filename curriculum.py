"""Task-specific curricula: the updates of a run divided into stages (the paper's "curriculum learning").

A stage is a share of the updates with reset options of its own, or with easier tasks only. DangerousTaxi learns to
pick up, then to drop off, then the whole trip with a milestone reward at pickup; AutoExplore begins with shallow files;
ALFWorld pays milestones at first. An environment of your own brings its stages as an attribute:
`curriculum = [("easy", 0.3, {"level": 1}), ("hard", 0.7, {"level": 2})]`.

    python curriculum.py --env taxi        # print the schedule
"""

import argparse
import dataclasses

import envs
from reflect_rl import COMMON, add_options, env_factory, parse_args


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the updates
    options: dict = dataclasses.field(default_factory=dict)  # of the environment's reset
    max_depth: int | None = None  # only tasks that are not deeper

    def select(self, tasks):
        """The tasks of this stage; all of them where none is shallow enough."""
        if self.max_depth is None:
            return tasks
        return [task for task in tasks if task.get("depth", 0) <= self.max_depth] or tasks


CURRICULA = {
    envs.DangerousTaxi: (
        Stage("pickup", 0.05, {"mode": "pickup"}),
        Stage("dropoff", 0.15, {"mode": "dropoff"}),
        Stage("full", 0.8, {"mode": "full", "milestone": 0.5}),
    ),
    envs.AutoExplore: (Stage("depth <= 1", 0.5, max_depth=1), Stage("all", 0.5)),
    envs.ALFWorld: (Stage("milestones", 0.5, {"milestone": 0.2}), Stage("all", 0.5)),
}


def stages_of(env, on=True, given=()):
    """The stages of an environment; one, the task itself, where it has no curriculum or `on` is false.

    Every stage has the environment's own training options (augmentation) beside its own. The command line wins: what
    is `given` to the environment's constructor, such as `mode`, no stage changes.
    """
    stages = (Stage("all", 1.0),)
    if on and env.curriculum:
        stages = [Stage(*stage) for stage in env.curriculum]
    elif on:
        for cls, its_stages in CURRICULA.items():
            stages = its_stages if isinstance(env, cls) else stages
    resolved = []
    for stage in stages:
        options = {**env.training, **stage.options}
        for name in given:
            options.pop(name, None)
        resolved.append(dataclasses.replace(stage, options=options))
    return resolved


def schedule(stages, updates):
    """The stage of every update, a list. Every stage has at least one update.

    With fewer updates than stages the first stages are left out, so that the task itself is always trained.
    """
    stages = stages[-updates:]
    total, plan, done = sum(stage.share for stage in stages), [], 0.0
    for i, stage in enumerate(stages):
        done += stage.share / total
        later = len(stages) - 1 - i  # stages that still need an update each
        end = min(max(round(updates * done), i + 1), updates - later)
        plan += [stage] * (end - len(plan))
    return plan


def main():
    parser = argparse.ArgumentParser(description="Print the curriculum of an environment.")
    add_options(parser, COMMON, {"updates": (100, "updates of the run", 1)})
    args = parse_args(parser)
    first = 1
    stages = stages_of(env_factory(args)(), given=dict(args.env_option))
    plan = schedule(stages, args.updates)
    for stage in stages:
        count = plan.count(stage)
        if count:
            print(f"updates {first:4}-{first + count - 1:<4} {stage.name:12} {stage.options}")
        first += count


if __name__ == "__main__":
    envs.run_main(main)
