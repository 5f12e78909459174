"""An episode as text, and animated in the terminal; what is shown while RL trains."""

import math
import sys
import time

from tqdm import tqdm

SHOW_EVERY = 25  # updates between episodes that are printed whole
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


def report(run, figures, episodes, bar):
    """Log line, progress bar, warnings, and now and then one whole episode."""
    run.log(figures)
    number = figures["step"]
    if "valid_success" in figures:
        tqdm.write(
            f"update {number:4} {figures.get('stage', 'before RL'):9} valid success {figures['valid_success']:4.0%} "
            f"of {figures['valid_episodes']}" + (f", entropy {figures['entropy']:.2f}" if number else "")
        )
    if not episodes:
        return
    bar.update()
    bar.set_postfix(
        stage=figures["stage"],
        success=f"{figures['success']:.0%}",
        ret=f"{figures['return']:.2f}",
        len=f"{figures['length']:.0f}",
        H=f"{figures['entropy']:.2f}",
    )
    if len({round(episode.total, 6) for episode in episodes}) == 1:
        tqdm.write(f"update {number}: every episode had the same return, there is nothing to learn from")
    if figures["entropy"] < 0.005 and figures["success"] < 0.9:
        tqdm.write(f"update {number}: the policy has stopped exploring; try a larger --entropy or a shorter SFT")
    if number % SHOW_EVERY == 0:
        tqdm.write(show(episodes[0]))
