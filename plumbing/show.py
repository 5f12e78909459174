"""An episode as text, and animated in the terminal."""

import math
import sys
import time

WATCH_PAUSE = 1.0  # seconds a step


def show_step(step, width=0):
    """A step as text: state, reflection, menu with probabilities, the action taken (>), the reward.

    With a `width` each probability is a bar as well.
    """
    lines = [step.state]
    if step.reflection is not None:
        lines += ["# Analyze:", step.reflection]
    for i, (action, log_prob) in enumerate(zip(step.actions, step.log_probs, strict=True)):
        p, mark = math.exp(log_prob), ">" if i == step.action else " "
        bar = f"{'█' * round(width * p):{width}}  " if width else ""
        lines.append(f"  {mark} {p:6.1%}  {bar}{action}")
    return "\n".join([*lines, f"reward {step.reward:+.2f}\n"])


def outcome(episode):
    """How an episode ended, in a word: the environment's own verdict, never one made from the return."""
    return "success" if episode.success else "failure" if episode.terminated else "out of time"


def ending(episode):
    return f"{outcome(episode)} after {len(episode.steps)} steps, return {episode.total:+.2f}"


def show(episode):
    """An episode as text: each step, and how it ended."""
    return "\n".join([*map(show_step, episode.steps), ending(episode)])


def watch(episode):
    """Print an episode step by step, on a terminal each in the place of the one before; the last state ends it."""
    frames = [show_step(step, width=30) for step in episode.steps]
    frames.append(f"{episode.state}\n\n{ending(episode)}")
    if not sys.stdout.isatty():
        return print("\n".join(frames))
    try:
        for frame in frames:
            print(f"\x1b[?25l\x1b[H\x1b[J{frame}", flush=True)  # hide the cursor, go to the top left, clear the screen
            time.sleep(WATCH_PAUSE)
    finally:
        print("\x1b[?25h", end="", flush=True)  # the cursor again, also after Ctrl-C
