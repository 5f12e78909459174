"""Gymnasium's environments with discrete actions, as text: `--env gym:FrozenLake-v1`, needs `pip install gymnasium`.

The state is the environment's `ansi` picture, the coloured cell in brackets, or else the observation; then the last
action. A task is a seed. Where the environment has a table of its transitions (FrozenLake, CliffWalking, Taxi) value
iteration is the expert, and the teacher names what may end badly. Without one: RL from the untuned policy (`--no-sft
--no-reflection`), or records of your own (`--data`). An environment without chance has one start: its splits differ by
nothing but their seeds, so test success is success in training.

    python rl.py --env gym:FrozenLake-v1 --env-option is_slippery=false
    python rl.py --env gym:Blackjack-v1 --no-sft --no-reflection
"""

import random
import re

from envs import Env, UserError

NAMES = {  # of the actions, in their order; others are called action 0, action 1, ...
    "FrozenLake": ("go left", "go down", "go right", "go up"),
    "CliffWalking": ("go up", "go right", "go down", "go left"),
    "Taxi": ("move south", "move north", "move east", "move west", "pick up the passenger", "drop off the passenger"),
    "Blackjack": ("stick", "hit"),
}
SUCCESS = {"CliffWalking": "terminated"}  # it pays nothing for the goal, and nothing else ends it
BRACKETS = {"34": "()", "35": "<>", "42": "{}"}  # of a coloured letter: Taxi's passenger, destination, full taxi
SEEDS = {"train": range(1000), "valid": range(1000, 1060), "test": range(2000, 2120), "final": range(3000, 3120)}
GAMMA = 0.99  # of value iteration


def bracketed(match):
    left, right = BRACKETS.get(match[1], "[]")
    return left + match[2] + right


def gymnasium():
    try:
        import gymnasium
    except ImportError:
        raise UserError("gym: environments need gymnasium: pip install gymnasium") from None
    return gymnasium


class GymText(Env):
    """`success`: "reward" (the last reward is positive) or "terminated"; other options are the environment's own."""

    settings = {"trajectories": 100, "reflect_steps": 200, "policy_steps": 60, "updates": 40}

    def __init__(self, horizon=0, success="", **options):
        name = re.split(r"-v\d", self.id.split("/")[-1])[0]
        try:
            plain = gymnasium().make(self.id, **options)
            modes = plain.unwrapped.metadata.get("render_modes", ())
            self.env = gymnasium().make(self.id, render_mode="ansi", **options) if "ansi" in modes else plain
            n = int(self.env.action_space.n)
        except UserError:
            raise
        except Exception as error:  # gymnasium raises what it likes
            line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise UserError(f"gym:{self.id} {options} cannot be made, or has no discrete actions ({line})") from None
        self.draws, self.success = "ansi" in modes, success or SUCCESS.get(name, "reward")
        if self.success not in ("reward", "terminated"):
            raise UserError(f"success {success!r} of gym:{self.id}: reward or terminated")
        self.horizon = horizon or self.env.spec.max_episode_steps or 100
        self.names = NAMES.get(name) or tuple(f"action {i}" for i in range(n))

    def tasks(self, split):
        if split not in SEEDS:
            raise UserError(f"unknown split {split!r}: there are tasks of {', '.join(SEEDS)}")
        return list(SEEDS[split])

    def reset(self, *, seed=None, options=None):
        task = (options or {}).get("task", 0)
        self.observation, _ = self.env.reset(seed=random.Random(f"{task}/{seed}").getrandbits(31))
        self.steps, self.last = 0, None
        return self.state(), {"actions": self.names, "success": False}

    def step(self, action):
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        self.steps, self.last = self.steps + 1, action
        success = bool(terminated) and (self.success == "terminated" or reward > 0)
        over = bool(truncated) or self.steps >= self.horizon
        return self.state(), float(reward), bool(terminated), over, {"actions": self.names, "success": success}

    def state(self):
        seen = self.observation
        text = "Observation: " + (", ".join(map(str, seen)) if isinstance(seen, tuple) else str(seen))
        if self.draws:  # colours mark where the agent is; a line in parentheses repeats the last action
            text = re.sub(r"^ *\(.*\)$", "", self.env.render(), flags=re.M)
            text = re.sub(r"\x1b\[(\d+)[;\d]*m(.)\x1b\[0m", bracketed, text)
            text = re.sub(r"\x1b\[[;\d]*m", "", text).strip()  # the outer one of two colours
        return f"{text}\nLast action: {'none' if self.last is None else self.names[self.last]}."


class Tabular(GymText):
    """An environment that shows its transitions: `P[state][action]` = [(probability, next state, reward, end)]."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table, values = self.env.unwrapped.P, {}
        change = 1.0
        while change > 1e-6:  # value iteration
            change = 0.0
            for state in self.table:
                best = max(self.worth(state, action, values) for action in self.table[state])
                change, values[state] = max(change, abs(best - values.get(state, 0.0))), best
        self.values = values

    def worth(self, state, action, values):
        total = 0.0
        for probability, after, reward, end in self.table[state][action]:
            total += probability * (reward + GAMMA * values.get(after, 0.0) * (not end))
        return total

    def expert_action(self):
        state = int(self.observation)
        return max(self.table[state], key=lambda action: self.worth(state, action, self.values))

    def reflection(self, mistake):
        bad = []
        for action, outcomes in self.table[int(self.observation)].items():
            if any(reward < -1 or (end and reward <= 0 and self.success == "reward") for _, _, reward, end in outcomes):
                bad.append(self.names[action])
        text = f"Dangerous here: {', '.join(bad) or 'nothing'}."
        return text + (f" To {self.names[self.last]} was a mistake." if mistake else "")


def env_of(name):
    """The class of `gym:ID`."""
    found = {"id": name.removeprefix("gym:")}
    try:
        has_table = hasattr(gymnasium().make(found["id"]).unwrapped, "P")
    except UserError:
        raise
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"gymnasium cannot make {found['id']!r} ({line})") from None
    return type(found["id"], (Tabular if has_table else GymText,), found)
