"""What an environment of one's own must keep to (the contract at the top of envs.py), looked at before a training."""

import json
import numbers

import envs
from envs import UserError

MOST_STEPS = 1000  # of an episode


def check(env):
    """Name the first violation of the contract by an environment of one's own, before anything is trained on it.

    The first tasks of each split are begun twice from one seed, and the last action is taken until the end.
    """
    seen = {}  # task as JSON -> its split
    for split in ("train", "valid", "test"):
        tasks = env.tasks(split)
        require(isinstance(tasks, (list, tuple)) and tasks, env, f"tasks({split!r}) must be a list, not {tasks!r}")
        for task in tasks:
            try:
                text = json.dumps(task)
            except (TypeError, ValueError):
                text = ""
            require(text, env, f"a task must be a JSON value, not {task!r}")
            require(seen.setdefault(text, split) == split, env, f"task {text} is in {split} and in {seen[text]}")
        for task in tasks[:3]:
            first, over = begun(env, task), False
            require(begun(env, task) == first, env, f"two resets with one seed and the task {task!r} differ")
            for _ in range(MOST_STEPS):
                result = env.step(len(first[1]) - 1)
                require(isinstance(result, tuple) and len(result) == 5, env, f"step() gave {result!r}, not 5 values")
                state, reward, terminated, truncated, info = result
                require(isinstance(reward, numbers.Real), env, f"a reward must be a number, not {reward!r}")
                first, over = checked(env, state, info), terminated or truncated
                if over:
                    break
            require(over, env, f"an episode has not ended after {MOST_STEPS} steps: truncate it at `horizon`")


def begun(env, task):
    """State, actions and success after a reset, checked."""
    result = env.reset(seed=0, options={**env.training, "task": task})
    require(isinstance(result, tuple) and len(result) == 2, env, f"reset() must return (state, info), not {result!r}")
    first = checked(env, *result)
    if type(env).expert_action is not envs.Env.expert_action:
        action = env.expert_action()
        within = isinstance(action, numbers.Integral) and 0 <= action < len(first[1])
        require(within, env, f"expert_action() is {action!r}, and there are {len(first[1])} actions")
    return first


def checked(env, state, info):
    """`(state, actions, success)` of what `reset` or `step` returned, checked."""
    require(isinstance(state, str) and state, env, f"a state must be a text that is not empty, not {state!r}")
    for key in ("actions", "success"):
        require(isinstance(info, dict) and key in info, env, f"info must have {key!r}: {info!r}")
    actions = tuple(info["actions"])
    good = actions and all(isinstance(action, str) and action for action in actions)
    require(good, env, f"info['actions'] must be texts, at least one: {actions!r}")
    return state, actions, bool(info["success"])


def require(condition, env, text):
    if not condition:
        raise UserError(f"the environment {type(env).__name__}: {text[:300]}")
