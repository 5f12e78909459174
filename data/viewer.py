"""The page of `eval.py --html`: `viewer.html` with what was played in it, to look at in a browser."""

import json
import math
import random
from pathlib import Path

import envs
import negatives
from envs import UserError
from plumbing.runs import write
from plumbing.show import outcome
from reflect_rl import one_line


def write_html(rows, settings, seed, path):
    """Write `viewer.html` with the sampled episodes of the rows in it: one file, which needs no network.

    `rows`: those of eval.py; `settings`: a dict, shown at the top; `seed`: the panel's, with which they were played.
    """
    runs = []
    for r in rows:
        for i, episodes in enumerate(r["sampled"]):
            name = r["name"] if len(r["sampled"]) == 1 else f"{r['name']}, {i}"
            told = [tell(episode, r["env"], seed, number) for number, episode in enumerate(episodes)]
            runs.append({"name": name, "episodes": told})
    # Texts come from outside. Without a "<" none of them can end the script element that holds the JSON.
    text = json.dumps({"settings": settings, "runs": runs}, default=str).replace("<", "\\u003c")
    write(path, (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8").replace("{{data}}", text))


def tell(episode, env, seed, number):
    """An episode as the page reads it; `number`: its place in the panel. `end` is the state after the last step."""
    steps = []
    for step, (expert, teacher) in zip(episode.steps, teachers_view(episode, env, seed, number), strict=True):
        told = {key: getattr(step, key) for key in ("state", "reflection", "actions", "action", "reward")}
        probs = [round(math.exp(log_prob), 6) for log_prob in step.log_probs]  # JSON has no -inf
        steps.append({**told, "probs": probs, "expert": expert, "teacher": teacher})
    return {"number": number, "task": episode.task, "groups": list(env.groups(episode.task)),
            "outcome": outcome(episode), "return": episode.total, "steps": steps, "end": episode.state}


def teachers_view(episode, env, seed, number):
    """Of each step the expert's action, and the teacher's words where the reflection is none of them; else None.

    Kept episodes have neither, so the episode is played again, from the seed that `reflect_rl.play` gave it. Where it
    comes out differently (another version of the environment) nothing is said.
    """
    nothing, found = [(None, None)] * len(episode.steps), []
    other = over = False
    if type(env).expert_action is envs.Env.expert_action:
        return nothing
    try:
        state, info = env.reset(seed=random.Random(f"{seed}/{number}").getrandbits(32), options={"task": episode.task})
        for step in episode.steps:
            if over or (state, list(info["actions"])) != (step.state, list(step.actions)):
                return nothing
            expert = int(env.expert_action())
            found.append((expert, correction(step.reflection, env, other)))
            other = step.action != expert
            state, _, terminated, truncated, info = env.step(step.action)
            over = terminated or truncated
    except UserError:  # an expert that does not know this task
        return nothing
    return found if state == episode.state else nothing


def correction(reflection, env, other):
    """The teacher's words on the current state, None where the reflection has them or there is no teacher.

    `other`: whether the last action was not the expert's. It may have been as good, so the reflection may call it a
    mistake or not.
    """
    if reflection is None:
        return None
    try:
        words = [one_line(negatives.reflection_of(env, mistake)) for mistake in (False, other)]
    except UserError:
        return None
    return None if reflection in words else words[-1]
