"""Steps per second of AutoExplore, against an environment that copies the tree and calls a shell, as the original does.

Both play the same random actions on data/repos; only the environment is timed, no model.

    python benchmarks/explore_speed.py [--episodes 200]
"""

import argparse
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from envs import DATA, AutoExplore


class ShellExplore(AutoExplore):
    """The same episodes, but every reset copies the repository, and listings and contents come from `ls` and `cat`."""

    def reset(self, *, seed=None, options=None):
        self.copy = tempfile.mkdtemp()
        shutil.copytree(DATA / "repos" / options["task"]["root"], self.copy, dirs_exist_ok=True)
        return super().reset(seed=seed, options=options)

    def shell(self, *command):
        return subprocess.run(command, cwd=pathlib.Path(self.copy, *self.cwd), capture_output=True, text=True).stdout

    def step(self, action):
        verb, name = self.moves[action]
        if verb == "cat":
            self.shell("sh", "-c", 'cat -- "$1"', "sh", name)
        answer = super().step(action)
        self.shell("sh", "-c", "ls -p")
        if self.done:
            shutil.rmtree(self.copy)
        return answer


def steps_per_second(env, tasks, episodes):
    rng, steps, start = random.Random(0), 0, time.perf_counter()
    for episode in range(episodes):
        _, info = env.reset(seed=episode, options={"task": tasks[episode % len(tasks)]})
        over = False
        while not over:
            *_, terminated, truncated, info = env.step(rng.randrange(len(info["actions"])))
            over, steps = terminated or truncated, steps + 1
    return steps / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description="Speed of AutoExplore.", allow_abbrev=False)
    parser.add_argument("--episodes", type=int, default=200, help="episodes of the shell version (default: 200)")
    args = parser.parse_args()
    tasks = AutoExplore(generated=0).tasks("train")
    memory = steps_per_second(AutoExplore(), tasks, 20 * args.episodes)
    shell = steps_per_second(ShellExplore(), tasks, args.episodes)
    print(f"in memory: {memory:,.0f} steps/s\ncopy and shell: {shell:,.0f} steps/s\nratio: {memory / shell:,.0f}")


if __name__ == "__main__":
    main()
