"""Text environments: the contract, and DangerousTaxi.

An agent reads a `state` (text), picks one of `info["actions"]` (a tuple of texts) by its index, and gets a
reward. The signature is Gymnasium's, without the dependency:

    state, info = env.reset(seed=0, options={"task": task})
    state, reward, terminated, truncated, info = env.step(action)

`terminated` means that the task itself ended (well or badly), `truncated` that the horizon was reached.
`info["success"]` is the environment's own verdict; nobody should infer it from the return.

DangerousTaxi is Gymnasium's Taxi-v3 in which any useless move is fatal, shown as a map of characters.

    python envs.py --env taxi              # play it by hand
"""

import argparse
import collections
import importlib
import random
import sys


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2 (see `run_main`)."""


class Env:
    """The contract. Subclass it (or imitate it: nothing checks the type) to bring an environment of your own.

    Required: `reset`, `step`, `tasks`. `expert_action` is needed for teacher data, `describe` only for the
    corpus of the base LM. A task is any JSON-serialisable value; options are the reset options of a
    curriculum stage, such as `{"mode": "pickup"}`.
    """

    horizon = 30  # steps after which an episode is truncated
    rules = ()  # what is true of every state, in sentences; corpus of the base LM only

    def reset(self, *, seed=None, options=None):
        """Start an episode: `(state, info)`. `seed` reseeds the env's own RNG; `options["task"]` names the task."""
        raise NotImplementedError

    def step(self, action):
        """Take `info["actions"][action]`: `(state, reward, terminated, truncated, info)`."""
        raise NotImplementedError

    def tasks(self, split):
        """The fixed list of tasks of a split, `train`, `valid` or `test`; the three are disjoint."""
        raise NotImplementedError

    def expert_action(self):
        """Index of an optimal action in the current state."""
        raise NotImplementedError

    def describe(self):
        """True, plain facts about the current state, no advice: `(beginning, rest)` pairs of sentences, such as
        `("The taxi is at row", " 2 column 3.")`. Corpus and examination of the base LM."""
        return []


def task_of(env, options):
    """The task of a reset: the one in `options`, else one drawn from the train split with the env's own RNG."""
    task = (options or {}).get("task")
    return env.rng.choice(env.tasks("train")) if task is None else task


def check_action(env, action, actions):
    """Refuse a step after the end or an index outside the action list: both are bugs of the caller."""
    if env.done:
        raise RuntimeError("step() after the end of the episode: call reset() first")
    if not 0 <= action < len(actions):
        raise IndexError(f"action {action} is outside the {len(actions)} valid actions of this state")


# ---------------------------------------------------------------------------------------------------------
# DangerousTaxi

TAXI_MAP = ("+---------+", "|R: | : :G|", "| : | : : |", "| : : : : |", "| | : | : |", "|Y| : |B: |", "+---------+")
LANDMARKS = ((0, 0), (0, 4), (4, 0), (4, 3))  # R, G, Y, B as (row, column), Taxi-v3's order
ON_BOARD = 4  # Taxi-v3's passenger index when the passenger is in the taxi
MOVES = {0: (1, 0), 1: (-1, 0), 2: (0, 1), 3: (0, -1)}  # action -> (row, column) step: south, north, east, west
PICKUP, DROPOFF = 4, 5


def taxi_encode(row, col, passenger, destination):
    """Taxi-v3's state number, 0..499."""
    return ((row * 5 + col) * 5 + passenger) * 4 + destination


def taxi_decode(state):
    """`(row, col, passenger, destination)` of a state number."""
    return state // 100, state // 20 % 5, state // 4 % 5, state % 4


def taxi_move(row, col, action):
    """Where a move ends: the same cell when a wall is in the way."""
    d_row, d_col = MOVES[action]
    if d_col and TAXI_MAP[row + 1][2 * col + 1 + d_col] == "|":  # the character between two cells: ':' open, '|' wall
        return row, col
    return min(max(row + d_row, 0), 4), col + d_col


def taxi_transition(state, action):
    """Taxi-v3's deterministic dynamics: `(next state, reward, terminated)`, reward unscaled (-1, -10, 20)."""
    row, col, passenger, destination = taxi_decode(state)
    if action in MOVES:
        return taxi_encode(*taxi_move(row, col, action), passenger, destination), -1, False
    if action == PICKUP:
        if passenger != ON_BOARD and (row, col) == LANDMARKS[passenger]:
            return taxi_encode(row, col, ON_BOARD, destination), -1, False
    elif passenger == ON_BOARD and (row, col) in LANDMARKS:
        place = LANDMARKS.index((row, col))
        arrived = place == destination
        return taxi_encode(row, col, place, destination), 20 if arrived else -1, arrived
    return state, -10, False


class DangerousTaxi(Env):
    """Taxi-v3 in which every action that changes nothing ends the episode in failure.

    Map letters: `T` taxi, `P` waiting passenger, `D` destination, `O` taxi on the waiting passenger, `X` taxi with
    the passenger on board; they cover the landmark's letter (a taxi on the destination hides `D`).
    A task is a Taxi-v3 state number. Modes: `pickup` (success at pickup), `dropoff` (the passenger is on board from
    the start), `full`. Rewards are Taxi-v3's over 20; death costs 10/20; `milestone` is paid at the first pickup.
    Horizon 30: the longest shortest trip is 18 moves, so an agent can still recover from half a dozen detours.
    """

    rules = (
        "Passenger waiting: the taxi has to pick up the passenger at P.",
        "Passenger on board: the taxi is shown as X and has to bring the passenger to D.",
        "Next goal of a trip: first the passenger, next the destination.",
        "To move into a wall was a mistake.",
        "To pick up the passenger or to drop off the passenger in the wrong place was a mistake.",
    )
    actions = ("move south", "move north", "move east", "move west", "pick up the passenger", "drop off the passenger")
    modes = ("full", "pickup", "dropoff")

    def __init__(self, mode="full", milestone=0.0, horizon=30):
        self.defaults = {"mode": mode, "milestone": milestone}
        self.horizon = horizon
        self.rng = random.Random()
        self.done = True

    def tasks(self, split):
        """180 / 30 / 90 starts. All starts that share taxi cell and destination are in one split, so that the
        splits are disjoint in every mode (in `dropoff` mode the passenger's place is gone)."""
        groups = [(row, col, destination) for row in range(5) for col in range(5) for destination in range(4)]
        random.Random(0).shuffle(groups)
        bounds = {"train": (0, 60), "valid": (60, 70), "test": (70, 100)}
        if split not in bounds:
            raise UserError(f"unknown split {split!r}: one of {', '.join(bounds)}")
        chosen = groups[slice(*bounds[split])]
        return [taxi_encode(row, col, p, d) for row, col, d in chosen for p in range(4) if p != d]

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = random.Random(seed)
        options = options or {}
        self.mode = options.get("mode", self.defaults["mode"])
        self.milestone = options.get("milestone", self.defaults["milestone"])
        task = task_of(self, options)
        if self.mode not in self.modes:
            raise UserError(f"unknown mode {self.mode!r} of DangerousTaxi: one of {', '.join(self.modes)}")
        if not isinstance(task, int) or not 0 <= task < 500:
            raise UserError(f"a task of DangerousTaxi is a Taxi-v3 state number, 0 to 499, not {task!r}")
        row, col, passenger, destination = taxi_decode(task)
        self.taxi_state = taxi_encode(row, col, ON_BOARD, destination) if self.mode == "dropoff" else task
        self.steps, self.done, self.success, self.last = 0, False, False, "none"
        self.milestone_due = self.mode == "full"
        return self.render(), self.info()

    def step(self, action):
        check_action(self, action, self.actions)
        before = self.taxi_state
        self.taxi_state, reward, arrived = taxi_transition(before, action)
        picked_up = action == PICKUP and self.taxi_state != before
        died = self.taxi_state == before
        self.success = arrived or (self.mode == "pickup" and picked_up)
        reward = 20 if self.success else -10 if died else reward
        if picked_up and self.milestone_due:
            reward, self.milestone_due = reward + 20 * self.milestone, False
        self.steps += 1
        self.last = self.actions[action] + (", which was fatal" if died else "")
        terminated = self.success or died
        truncated = not terminated and self.steps >= self.horizon
        self.done = terminated or truncated
        return self.render(), reward / 20, terminated, truncated, self.info()

    def info(self):
        return {"actions": self.actions, "success": self.success}

    def render(self):
        row, col, passenger, destination = taxi_decode(self.taxi_state)
        grid = [list(line) for line in TAXI_MAP]
        marks = [(*LANDMARKS[destination], "D")]
        if passenger == ON_BOARD:
            marks.append((row, col, "X"))
        else:
            marks += [(*LANDMARKS[passenger], "P"), (row, col, "O" if (row, col) == LANDMARKS[passenger] else "T")]
        for r, c, letter in marks:
            grid[r + 1][2 * c + 1] = letter
        return "\n".join("".join(line) for line in grid) + f"\nLast action: {self.last}."

    def target(self):
        """Cell of the current sub-goal: the waiting passenger, then the destination."""
        _, _, passenger, destination = taxi_decode(self.taxi_state)
        return LANDMARKS[destination if passenger == ON_BOARD else passenger]

    def expert_action(self):
        """First step of a shortest path to the sub-goal; of several, the first in action order."""
        row, col, passenger, _ = taxi_decode(self.taxi_state)
        if (row, col) == self.target() or (self.mode == "pickup" and passenger == ON_BOARD):
            return DROPOFF if passenger == ON_BOARD else PICKUP
        here = taxi_distances(self.target())[row, col]
        return next(a for a in MOVES if taxi_distances(self.target())[taxi_move(row, col, a)] < here)

    def describe(self):
        row, col, passenger, destination = taxi_decode(self.taxi_state)
        places = {"destination": LANDMARKS[destination]}
        if passenger != ON_BOARD:
            places["passenger"] = LANDMARKS[passenger]
        facts = [
            ("The taxi is at row", f" {row} column {col}."),
            ("The passenger is now", " on board." if passenger == ON_BOARD else " waiting."),
        ]
        for name, (r, c) in places.items():
            facts += [
                (f"The {name} is at row", f" {r} column {c}."),
                (f"From the taxi to the {name}:", f" {taxi_offset(row, col, r, c)}."),
            ]
        for a in MOVES:
            r, c = taxi_move(row, col, a)
            facts.append(
                (f"To {self.actions[a]}", " is blocked." if (r, c) == (row, col) else f" leads to row {r} column {c}.")
            )
        return [*facts, ("Blocked:", f" {', '.join(self.blocked()) or 'nothing'}.")]

    def blocked(self):
        """The directions in which a wall or the border is in the way, such as `["east"]`."""
        row, col, *_ = taxi_decode(self.taxi_state)
        return [self.actions[a].split()[1] for a in MOVES if taxi_move(row, col, a) == (row, col)]


def taxi_offset(row, col, to_row, to_col):
    """Where a cell lies as seen from another: `2 south and 1 east`, `here`."""
    parts = [f"{to_row - row} south"] * (to_row > row) + [f"{row - to_row} north"] * (to_row < row)
    parts += [f"{to_col - col} east"] * (to_col > col) + [f"{col - to_col} west"] * (to_col < col)
    return " and ".join(parts) or "here"


def taxi_distances(target, _cache={}):
    """Moves from every cell to `target`, by breadth-first search (moves are reversible): `{(row, col): moves}`."""
    if target not in _cache:
        distances, queue = {target: 0}, collections.deque([target])
        while queue:
            cell = queue.popleft()
            for neighbour in (taxi_move(*cell, a) for a in MOVES):
                if neighbour not in distances:
                    distances[neighbour] = distances[cell] + 1
                    queue.append(neighbour)
        _cache[target] = distances
    return _cache[target]


# ---------------------------------------------------------------------------------------------------------
# Making and playing

ENVS = {"taxi": DangerousTaxi}


def make(name, **options):
    """An environment by short name, or yours as `package.module:Class`; options go to its constructor."""
    if name in ENVS:
        cls = ENVS[name]
    elif ":" in name:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot load environment {name!r}: {error}") from None
    else:
        raise UserError(f"unknown environment {name!r}: one of {', '.join(ENVS)}, or package.module:Class")
    try:
        return cls(**options)
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take these options {options}: {error}") from None


def run_main(main):
    """Run a script's `main`: a user error ends with one line and exit code 2, Ctrl-C with 130, no traceback."""
    if "." not in sys.path and "" not in sys.path:
        sys.path.append(".")  # so that --env my_module:MyEnv finds a file of the current directory
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description="Play an environment by hand.", allow_abbrev=False)
    parser.add_argument("--env", default="taxi", help="taxi, or package.module:Class (default: taxi)")
    parser.add_argument(
        "--split", default="train", choices=("train", "valid", "test"), help="split of the task (default: train)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which task of the split, and the env's seed (default: 0)")
    args = parser.parse_args()
    env = make(args.env)
    tasks = env.tasks(args.split)
    state, info = env.reset(seed=args.seed, options={"task": tasks[args.seed % len(tasks)]})
    total, over = 0.0, False
    while not over:
        print(f"\n{state}\n" + "\n".join(f"  {i}  {text}" for i, text in enumerate(info["actions"])))
        try:
            answer = input("action number (q quits, e asks the expert): ").strip()
        except EOFError:
            return
        if answer == "q":
            return
        if answer == "e":
            print("the expert would: " + info["actions"][env.expert_action()])
        elif answer.isdecimal() and int(answer) < len(info["actions"]):
            state, reward, terminated, truncated, info = env.step(int(answer))
            total, over = total + reward, terminated or truncated
            print(f"reward {reward:+.2f}")
        else:
            print(f"please type a number from 0 to {len(info['actions']) - 1}")
    print(f"\n{state}\n{'success' if info['success'] else 'failure'}, return {total:+.2f}")


if __name__ == "__main__":
    run_main(main)
