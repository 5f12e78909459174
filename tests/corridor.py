"""A second environment, as a user would bring it: `--env corridor:Corridor`. Small, so that whole runs take seconds.

A walker in a corridor of cells 0..4 stands at `here` and wants to reach `goal`; a step over the border is fatal.
"""

import random

import envs


class Corridor(envs.Env):
    actions = ("go left", "go right")
    curriculum = [("near", 0.5, {"near": True}), ("all", 0.5, {})]
    horizon = 6

    def __init__(self, length=5):
        self.length, self.rng, self.done = length, random.Random(), True

    def tasks(self, split):
        pairs = [[here, goal] for here in range(self.length) for goal in range(self.length) if here != goal]
        bounds = {"train": (0, 10), "valid": (10, 15), "test": (15, 20)}
        random.Random(0).shuffle(pairs)
        return pairs[slice(*bounds[split])]

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = random.Random(seed)
        options = options or {}
        task = options.get("task")
        self.here, self.goal = self.rng.choice(self.tasks("train")) if task is None else task
        if options.get("near"):
            self.here = min(max(self.here, self.goal - 1), self.goal + 1)
        self.steps, self.done, self.success, self.last = 0, False, False, "none"
        return self.render(), self.info()

    def step(self, action):
        assert not self.done
        self.here += 2 * action - 1
        self.steps, self.last = self.steps + 1, self.actions[action]
        fell, self.success = not 0 <= self.here < self.length, self.here == self.goal
        terminated, reward = fell or self.success, 1.0 if self.success else -0.5 if fell else -0.1
        truncated = not terminated and self.steps >= self.horizon
        self.done = terminated or truncated
        return self.render(), reward, terminated, truncated, self.info()

    def info(self):
        return {"actions": self.actions, "success": self.success}

    def render(self):
        return f"at {self.here}, goal {self.goal}. last: {self.last}."

    def expert_action(self):
        return int(self.goal > self.here)

    def reflection(self, mistake):
        return f"{'That was a mistake. ' if mistake else ''}The goal is {abs(self.goal - self.here)} away."
