"""Text environments: the contract, DangerousTaxi, AutoExplore, ALFWorld.

An agent reads a `state` (text), picks one of `info["actions"]` (a tuple of texts) by its index, and gets a
reward. The signature is Gymnasium's, without the dependency:

    state, info = env.reset(seed=0, options={"task": task})
    state, reward, terminated, truncated, info = env.step(action)

`terminated` means that the task itself ended (well or badly), `truncated` that the horizon was reached.
`info["success"]` is the environment's own verdict; nobody should infer it from the return.

Deviation: the paper's states carry all that happened so far; ours show what it left behind, so that they repeat and
stay short. Tasks, repositories and rooms are read from data/, and what made them stands there.

    python envs.py --env taxi              # play it by hand; or autoexplore, alfworld
"""

import argparse
import functools
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import os
import pathlib
import random
import re
import sys
import traceback

DATA = pathlib.Path(__file__).resolve().parent / "data"


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2 (see `run_main`)."""


class Env:
    """The contract. Subclass it to bring an environment of your own: `--env package.module:Class`.

    All need `reset`, `step` and `tasks`, teacher data also `expert_action` and `reflection`; the rest has defaults.
    `info` has `actions` (a tuple of texts) and `success`. A task is any JSON-serialisable value. After a `reset` with
    the same seed and task everything is the same again. The environment truncates itself at its horizon.
    """

    horizon = 30  # steps after which an episode is truncated
    settings = {}  # its own defaults of command-line options, such as {"trajectories": 1000}
    training = {}  # reset options of training episodes and teacher data (augmentation); evaluation has none
    panels = ("test",)  # splits that rl.py evaluates in the end
    curriculum = ()  # stages of the online training, see curriculum.py: [(name, share, reset options), ...]

    def reset(self, *, seed=None, options=None):
        """Start an episode: `(state, info)`. `seed` reseeds the env's own RNG; `options["task"]` names the task."""
        raise missing(self, "reset")

    def step(self, action):
        """Take `info["actions"][action]`: `(state, reward, terminated, truncated, info)`."""
        raise missing(self, "step")

    def tasks(self, split):
        """The fixed list of tasks of a split, `train`, `valid` or `test`; they are disjoint, none is empty.

        Ours also have `final`, which is played once, for the README.
        """
        raise missing(self, "tasks")

    def groups(self, task):
        """Names of the groups of tasks, such as `depth 2`, under which evaluation reports a task as well."""
        return ()

    def cluster(self, task):
        """What tasks share that succeed or fail together, such as a repository: intervals are over these."""
        return json.dumps(task)

    def expert_action(self):
        """Index of an optimal action in the current state, whichever that is: mistakes lead off the way."""
        raise missing(self, "expert_action")

    def reflection(self, mistake):
        """A teacher's words on the current state; `mistake`: whether the last action was not the expert's.

        The environments of this file have their teachers in negatives.py. A method of your own wins.
        """
        raise missing(self, "reflection")

    def mistakes(self):
        """Indices of the actions that a negative example may take; None: found by playing on (negatives.py)."""
        return None


def missing(env, method):
    return UserError(f"the environment {type(env).__name__} needs a method {method}(), see envs.Env.{method}")


class BuiltIn(Env):
    """What the environments below share: tasks by split, the RNG, the horizon, and the form of `reset` and `step`.

    Each brings the attribute `actions` and three methods: `begin(task, options)` sets an episode up, `act(action)`
    returns `(reward, terminated)` and may set `success`, `render()` returns the state.
    """

    def __init__(self, all_tasks, horizon, **defaults):
        self.all_tasks, self.horizon = all_tasks, horizon  # {split: tasks}, steps
        self.defaults = defaults  # of the reset options
        self.rng = random.Random()  # its own: nothing else that draws can change an episode
        self.done = True

    def tasks(self, split):
        if split not in self.all_tasks:
            raise UserError(f"unknown split {split!r}: there are tasks of {', '.join(self.all_tasks) or 'none'}")
        return list(self.all_tasks[split])

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = random.Random(seed)
        options = self.defaults | (options or {})
        task = options.get("task")
        if task is None:
            task = self.rng.choice(self.tasks("train"))
        self.begin(task, options)
        self.steps, self.done, self.success = 0, False, False
        return self.render(), {"actions": self.actions, "success": False}

    def step(self, action):
        # Both are bugs of the caller. A negative index would be taken without a word.
        if self.done:
            raise RuntimeError("step() after the end of the episode: call reset() first")
        if not 0 <= action < len(self.actions):
            raise IndexError(f"action {action} is outside the {len(self.actions)} valid actions of this state")
        reward, terminated = self.act(action)
        self.steps += 1
        truncated = not terminated and self.steps >= self.horizon
        self.done = terminated or truncated
        return self.render(), reward, terminated, truncated, {"actions": self.actions, "success": self.success}


@functools.cache
def shipped(path):
    """The content of a packed JSON file of data/, read once a process: it is everybody's, so change nothing in it."""
    return json.loads(gzip.decompress((DATA / path).read_bytes()))


@functools.cache
def beside(path):
    """A module that stands beside the data or the models, and is none of the seven files."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, DATA / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------
# DangerousTaxi

TAXI_MAP = ("+---------+", "|R: | : :G|", "| : | : : |", "| : : : : |", "| | : | : |", "|Y| : |B: |", "+---------+")
LANDMARKS = ((0, 0), (0, 4), (4, 0), (4, 3))  # R, G, Y, B as (row, column), Taxi-v3's order
ON_BOARD = 4  # Taxi-v3's passenger index when the passenger is in the taxi
MOVES = {0: (1, 0), 1: (-1, 0), 2: (0, 1), 3: (0, -1)}  # action -> (row, column) step: south, north, east, west
PICKUP, DROPOFF = 4, 5
# With `holdout=pairs`: (passenger, destination) of no training trip. In training every landmark is twice either.
PAIRS = {(0, 1): "valid", (1, 2): "test", (2, 3): "final", (3, 0): "final"}


def taxi_encode(row, col, passenger, destination):
    """Taxi-v3's state number, 0..499."""
    return ((row * 5 + col) * 5 + passenger) * 4 + destination


def taxi_decode(state):
    """`(row, col, passenger, destination)` of a state number."""
    return state // 100, state // 20 % 5, state // 4 % 5, state % 4


def taxi_move(row, col, action):
    """Where a move ends: the same cell when a wall is in the way."""
    d_row, d_col = MOVES[action]
    # The map has a character between two cells: ':' is open, '|' is a wall. There are no walls north or south.
    if d_col and TAXI_MAP[row + 1][2 * col + 1 + d_col] == "|":
        return row, col
    return min(max(row + d_row, 0), 4), col + d_col


class DangerousTaxi(BuiltIn):
    """Taxi-v3 in which every action that changes nothing ends the episode in failure.

    Map letters: `T` taxi, `P` waiting passenger, `D` destination, `O` taxi on the waiting passenger, `X` taxi with
    the passenger on board; they cover the landmark's letter (a taxi on the destination hides `D`).
    A task is a Taxi-v3 state number. Modes: `pickup` (success at pickup), `dropoff` (the passenger is on board from
    the start), `full`. Rewards are Taxi-v3's over 20; death costs 10/20; `milestone` is paid at the first pickup.
    Horizon 30: the longest shortest trip is 18 moves, so an agent can still recover from half a dozen detours.

    Held out are starts, as in the paper: a test trip begins where none of training does, and passes through states of
    training. With `holdout="pairs"` they are pairs of passenger and destination, whose maps the teacher's data never
    shows before the pickup: a harder question, whether map reading is more than the recall of eight maps.
    """

    actions = ("move south", "move north", "move east", "move west", "pick up the passenger", "drop off the passenger")
    modes = ("full", "pickup", "dropoff")

    def __init__(self, mode="full", milestone=0.0, horizon=30, holdout="starts"):
        if holdout not in ("starts", "pairs") or (holdout == "pairs" and mode == "dropoff"):
            raise UserError(f"holdout {holdout!r} of DangerousTaxi: starts, or pairs where a passenger waits")
        # All starts that share taxi cell and destination are in one split: in `dropoff` mode they are the same start.
        groups, tasks = list(itertools.product(range(5), range(5), range(4))), {}  # row, column, destination
        random.Random(0).shuffle(groups)  # always the same order
        parts = {"train": groups[:45], "valid": groups[60:70], "test": groups[70:], "final": groups[45:60]}
        for split, part in parts.items():
            tasks[split] = []
            for row, col, destination in groups if holdout == "pairs" else part:
                for p in range(4):
                    other = holdout == "pairs" and PAIRS.get((p, destination), "train") != split
                    if p != destination and not other:
                        tasks[split].append(taxi_encode(row, col, p, destination))
        super().__init__(tasks, horizon, mode=mode, milestone=milestone)

    def begin(self, task, options):
        self.mode, self.milestone = options["mode"], options["milestone"]
        if self.mode not in self.modes:
            raise UserError(f"unknown mode {self.mode!r} of DangerousTaxi: one of {', '.join(self.modes)}")
        if not isinstance(task, int) or not 0 <= task < 500:
            raise UserError(f"a task of DangerousTaxi is a Taxi-v3 state number, 0 to 499, not {task!r}")
        row, col, passenger, destination = taxi_decode(task)
        self.taxi_state = taxi_encode(row, col, ON_BOARD, destination) if self.mode == "dropoff" else task
        self.before = self.taxi_state  # what the last action started from
        self.last = "none"
        self.milestone_due = self.mode == "full"

    def act(self, action):
        """Taxi-v3's deterministic dynamics and rewards (-1 a step, 20 at the end); what changes nothing is fatal."""
        self.before = self.taxi_state
        row, col, passenger, destination = taxi_decode(self.before)
        reward = -1
        if action in MOVES:
            row, col = taxi_move(row, col, action)
        elif action == PICKUP and passenger != ON_BOARD and (row, col) == LANDMARKS[passenger]:
            passenger = ON_BOARD
            self.success = self.mode == "pickup"
            # Only the first pickup pays: to drop the passenger and pick him up again must not be a way to get rich.
            if self.milestone_due:
                reward, self.milestone_due = reward + 20 * self.milestone, False
        elif action == DROPOFF and passenger == ON_BOARD and (row, col) in LANDMARKS:
            # Taxi-v3 lets the passenger out at any of the four landmarks, but the trip ends at the destination only.
            passenger = LANDMARKS.index((row, col))
            self.success = passenger == destination
        self.taxi_state = taxi_encode(row, col, passenger, destination)
        died = self.taxi_state == self.before  # the danger: Taxi-v3 would let the agent try again
        self.last = self.actions[action] + (", which was fatal" if died else "")
        if died or self.success:
            reward = 20 if self.success else -10
        return reward / 20, self.success or died

    def render(self):
        row, col, passenger, destination = taxi_decode(self.taxi_state)
        # A passenger on board is where the taxi is. Later letters cover earlier ones.
        place = (row, col) if passenger == ON_BOARD else LANDMARKS[passenger]
        letters = {LANDMARKS[destination]: "D", place: "P"}
        letters[row, col] = "X" if passenger == ON_BOARD else "O" if place == (row, col) else "T"
        grid = list(map(list, TAXI_MAP))  # a cell (r, c) is the character (r + 1, 2c + 1)
        for (r, c), letter in letters.items():
            grid[r + 1][2 * c + 1] = letter
        return "\n".join(map("".join, grid)) + f"\nLast action: {self.last}."

    def target(self):
        """Cell of the current sub-goal: the waiting passenger, then the destination."""
        _, _, passenger, destination = taxi_decode(self.taxi_state)
        return LANDMARKS[destination if passenger == ON_BOARD else passenger]

    def expert_action(self):
        """First step of a shortest path to the sub-goal; of several, the first in action order."""
        row, col, passenger, _ = taxi_decode(self.taxi_state)
        if (row, col) == self.target() or (self.mode == "pickup" and passenger == ON_BOARD):
            return DROPOFF if passenger == ON_BOARD else PICKUP
        # Breadth-first search: cells in order of distance, each with the first action of the way to it.
        ways, seen = [(row, col, None)], set()
        for row, col, first in ways:  # the list grows while it is read
            if (row, col) == self.target():
                return first
            if (row, col) not in seen:
                seen.add((row, col))
                for action in MOVES:
                    ways.append((*taxi_move(row, col, action), action if first is None else first))

    def blocked(self):
        """The directions in which a wall or the border is in the way, such as `["east"]`."""
        row, col, *_ = taxi_decode(self.taxi_state)
        return [self.actions[a].split()[1] for a in MOVES if taxi_move(row, col, a) == (row, col)]


def taxi_offset(row, col, to_row, to_col):
    """Where a cell lies as seen from another: `2 south and 1 east`, `here`."""
    parts = []
    for distance, onward, back in ((to_row - row, "south", "north"), (to_col - col, "east", "west")):
        if distance:
            parts.append(f"{abs(distance)} {onward if distance > 0 else back}")
    return " and ".join(parts) or "here"


# ---------------------------------------------------------------------------------------------------------
# AutoExplore. A tree is nested dicts, name -> dict (a directory) or str (what `cat` shows of a file). Names and texts
# are made fit to be shown where trees are made, in data/autoexplore/prepare.py.

PAGE_ACTIONS, PAGE_CHARS = 26, 160  # of a listing: moves in its menu, characters of names


def files_of(tree, path=()):
    """Every file of a tree: `(path as a tuple of names, text)`, sorted."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from files_of(tree[name], path + (name,))
        else:
            yield path + (name,), tree[name]


def pages_of(directory, cwd=(), hidden=frozenset()):
    """The names of a directory, subdirectories first, in pages that leave room for `cd ..` and `more` in the menu.

    A page has at most `PAGE_CHARS` characters of names, but one name in any case.
    """
    pages, room, chars = [[]], PAGE_ACTIONS - 2, PAGE_CHARS
    for name in sorted(directory, key=lambda name: (not isinstance(directory[name], dict), name)):
        if cwd + (name,) in hidden:  # left out, see `begin`
            continue
        cost = 1 if isinstance(directory[name], dict) else 2  # `cd`; `cat` and `id`
        if cost > room or (pages[-1] and len(name) > chars):
            pages.append([])
            room, chars = PAGE_ACTIONS - 2, PAGE_CHARS
        pages[-1].append(name)
        room, chars = room - cost, chars - len(name)
    return pages


class AutoExplore(BuiltIn):
    """Find the file of a directory tree that answers a question.

    A task is a dict: `question`, `targets` (paths with `/`), `repo` (a name in `repos`), `depth` (0: a file of the root
    directory), `kind` (of its repository). Moves: `cd NAME`, `cat NAME` (not twice), `id NAME` (the answer and the end:
    right +1, wrong -0.5), `more` to turn a page; each costs 0.02. The state shows what was seen of the directory that
    the agent is in.

    `repos`: a directory of yours, or a file like the shipped one (see data/autoexplore/prepare.py). Reset options, with
    defaults here: `shuffle` the menu, `leave_out` (hide each file that is not a target with this probability).
    """

    settings = {"labels": "words", "trajectories": 2000, "negatives": 0.75, "reflect_steps": 1000, "policy_steps": 500,
                "updates": 40, "eval_every": 40, "rl_lr": 2e-3, "max_reflection": 160}
    training = {"shuffle": True, "leave_out": 0.2}
    panels = ("templates", "test")  # questions as in training about other repositories; and as people ask them

    def __init__(self, repos=None, horizon=15, shuffle=False, leave_out=0.0):
        own = beside("autoexplore/prepare.py").read(os.path.abspath(str(repos))) if repos else None
        data = own or shipped("autoexplore/repos.json.gz")  # not checked here: a test compares it with its maker's
        self.repos = data["repos"]  # {name: tree}
        super().__init__(data["tasks"], horizon, shuffle=shuffle, leave_out=leave_out)
        self.panels = [split for split in self.panels if split in data["tasks"]]  # your own have no templates

    def groups(self, task):
        return f"depth {task['depth']}", f"{task['kind']} repository"

    def cluster(self, task):
        return task["repo"]

    def begin(self, task, options):
        self.task = task
        self.question = " ".join(task["question"].split())
        self.targets = {tuple(target.split("/")) for target in task["targets"]}
        self.tree = self.repos[task["repo"]]
        self.shuffle = options["shuffle"]
        self.hidden = set()  # paths of the files that are left out
        if options["leave_out"]:
            for path, _ in files_of(self.tree):
                if path not in self.targets and self.rng.random() < options["leave_out"]:
                    self.hidden.add(path)
        self.seen = set()  # paths of the files read and the directories entered
        self.last, self.result = ("start", ""), ""
        self.enter(())

    def enter(self, cwd):
        self.cwd, self.page = cwd, 0
        self.directory = self.tree
        for name in cwd:
            self.directory = self.directory[name]
        self.pages = pages_of(self.directory, cwd, self.hidden)  # lists of names; `more` turns them
        self.list_moves()

    def list_moves(self):
        """The valid moves as `(verb, name)`: those of this page, `cd ..` below the root, `more` if there are pages."""
        self.moves = [("cd", "..")] if self.cwd else []
        for name in self.pages[self.page]:
            if isinstance(self.directory[name], dict):
                self.moves.append(("cd", name))
                continue
            if self.cwd + (name,) not in self.seen:
                self.moves.append(("cat", name))
            self.moves.append(("id", name))
        if len(self.pages) > 1:
            self.moves.append(("more", ""))
        if self.shuffle:  # so that the policy reads the menu and does not learn positions
            self.rng.shuffle(self.moves)
        self.actions = tuple(f"{verb} {name}".strip() for verb, name in self.moves)

    def act(self, action):
        verb, name = self.last = self.moves[action]
        reward, self.result = -0.02, ""
        if verb == "cd":
            self.enter(self.cwd[:-1] if name == ".." else self.cwd + (name,))
            self.seen.add(self.cwd)
        elif verb == "cat":
            self.seen.add(self.cwd + (name,))
            self.result = self.directory[name]
        elif verb == "more":
            self.page = (self.page + 1) % len(self.pages)
        else:  # id
            self.success = self.cwd + (name,) in self.targets
            self.result = "right" if self.success else "wrong"
            reward += 1.0 if self.success else -0.5
        self.list_moves()  # also after `cat`: a file is read once
        return reward, verb == "id"

    def names_here(self):
        """The names on this page, directories with a slash, and those of them that have been read or visited."""
        here, seen = [], []
        for name in self.pages[self.page]:
            here.append(f"{name}/" if isinstance(self.directory[name], dict) else name)
            if self.cwd + (name,) in self.seen:
                seen.append(here[-1])
        return here, seen

    def render(self):
        here, seen = map(" ".join, self.names_here())
        page = f" (page {self.page + 1} of {len(self.pages)})" if len(self.pages) > 1 else ""
        lines = f"Question: {self.question}\nDirectory: /{'/'.join(self.cwd)}\nHere: {here or 'nothing'}{page}\n"
        lines += f"Seen: {seen or 'nothing'}\nLast: {' '.join(self.last)}".strip()
        return f"{lines}\n{self.result}" if self.result else lines

    def expert_action(self):
        """One step of a shortest way to the nearest target: there, read it unless that was done, and identify it."""
        # Up to the directory that both ways share, and down again; our own depth is the same in each.
        target = min(self.targets, key=lambda t: (len(t) - 2 * len(os.path.commonprefix([self.cwd, t[:-1]])), t))
        if target[: len(self.cwd)] != self.cwd:
            move = ("cd", "..")  # the target is not below this directory
        elif len(target) > len(self.cwd) + 1:
            move = ("cd", target[len(self.cwd)])
        else:
            move = ("id" if target in self.seen else "cat", target[-1])
        return self.moves.index(move if move in self.moves else ("more", ""))  # it may be on another page

    def mistakes(self):
        """The actions that are not the expert's and do not end the episode; none once the answer has been read.

        A state shows only the file read last, so the reflector could not know which of those before was the right one.
        When the expert would read a file, the mistake is to read another: it has some words of the question, not all.
        """
        if self.seen & self.targets:
            return []
        expert = self.expert_action()
        wrong = [i for i, (verb, _) in enumerate(self.moves) if i != expert and verb != "id"]
        if self.moves[expert][0] == "cat":
            return [i for i in wrong if self.moves[i][0] == "cat"] or wrong
        return wrong


# ---------------------------------------------------------------------------------------------------------
# ALFWorld

STATIONS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}  # verb -> the receptacle that does it
TRAITS = {"clean": "clean", "heat": "hot", "cool": "cool"}  # verb -> what the object is afterwards
THING = r"[a-z]+ \d+"  # the name of an object or a receptacle, such as `shelf 2`


@functools.cache
def household():
    """The tables of data/alfworld/house.json in lower case: names as the game shows them."""
    return json.loads((DATA / "alfworld" / "house.json").read_text(encoding="utf-8").lower())


def kind(thing):
    """`tomato` of `tomato 1`."""
    return thing.split()[0]


def in_order(things):
    """Sorted by name, then by number: `shelf 2` before `shelf 10`."""
    return sorted(things, key=lambda thing: (kind(thing), int(thing.split()[1])))


def treatment(type_name):
    """The verb of a task type (`clean`, `heat`, `cool`), or None."""
    return next((verb for verb in STATIONS if f"_{verb}_" in type_name), None)


def homes_of(name):
    """The kinds of receptacle where an object is kept in any room, most usual first."""
    homes = []
    for table in household()["homes"].values():
        homes += table.get(name, [])
    return list(dict.fromkeys(homes))  # without repetitions, in order


def likely(name, notes):
    """The places that were not searched, in the order in which one would look for an object."""
    homes, places = homes_of(name), notes.unsearched()
    # Where it is usually kept comes first. Both sorts are stable: places of equal rank keep their order.
    places.sort(key=lambda place: homes.index(kind(place)) if kind(place) in homes else len(homes))
    return sorted(places, key=lambda place: place != notes.here)  # a closed one in front of us before all others


class Notes:
    """What an agent in a house knows: read off ALFWorld's sentences, so it is the same on both engines."""

    def __init__(self, opening):
        room, _, task = opening.partition("Your task is to: ")
        self.sentence = task.strip().removesuffix(".")
        self.receptacles = in_order(re.findall(rf"a ({THING})", room))
        self.contents = {}  # receptacle -> objects last seen there; a receptacle that was never looked into is missing
        self.shut, self.lit = set(), set()  # receptacles seen closed, lamps turned on
        self.traits = {}  # object -> what was done to it, from TRAITS
        self.here = self.hand = self.origin = None  # origin: where the object in hand was taken
        self.command, self.observation = "none", "You are in the middle of a room."

    def update(self, command, observation):
        """Take in what a command did. One observation can tell several things."""
        self.command, self.observation = command, observation
        if found := re.search(rf"You arrive at ({THING})\.", observation):
            self.here = found[1]
        if found := re.search(rf"(?:On the |The )({THING})(?: is open\. In it)?, you see (.*)\.", observation):
            self.contents[found[1]] = re.findall(rf"a ({THING})", found[2])
            self.shut.discard(found[1])
        if found := re.search(rf"(?:The ({THING}) is closed|You close the ({THING}))\.", observation):
            self.shut.add(found[1] or found[2])
        if found := re.search(rf"You pick up the ({THING}) from the ({THING})\.", observation):
            self.hand, self.origin = found[1], found[2]
            if self.hand in self.contents.get(self.origin, ()):
                self.contents[self.origin].remove(self.hand)
        if found := re.search(rf"You move the ({THING}) to the ({THING})\.", observation):
            self.hand = None
            self.contents.setdefault(found[2], []).append(found[1])
        if found := re.search(rf"You (clean|heat|cool) the ({THING}) using", observation):
            traits = self.traits.setdefault(found[2], set())
            if found[1] != "clean":  # hot and cool exclude each other
                traits -= {"hot", "cool"}
            traits.add(TRAITS[found[1]])
        if found := re.search(rf"You turn on the ({THING})\.", observation):
            self.lit.add(found[1])

    def unsearched(self):
        return [place for place in self.receptacles if place not in self.contents]

    def where(self, name):
        """`{object: receptacle}` of all objects of a kind that were seen and are still there."""
        found = {}
        for place in self.receptacles:
            for thing in in_order(self.contents.get(place, ())):
                if kind(thing) == name:
                    found[thing] = place
        return found

    def title(self, thing):
        """An object with what was done to it: `clean hot tomato 1`, `lit desklamp 1`."""
        lit = ["lit"] if thing in self.lit else []
        return " ".join([*lit, *sorted(self.traits.get(thing, ())), thing])


class ALFWorld(BuiltIn):
    """Household tasks in ALFWorld's language, on the built-in engine or, with `games=PATH`, on the real one.

    A built-in task is a dictionary: `type`, `object`, `target`, the `sentence` that asks for it, and its room, a list
    `receptacles` and `objects` (object -> receptacle); `combination` says whether training has this object and target
    for this type. A real one is `{"game": path of a game.tw-pddl}`. The state is not the history: it is the task,
    what was searched and found so far, what is in hand, and the last command with its observation.
    Reward: 1 when the task is done, -0.01 a step, and `milestone` for each of found, taken, treated, placed, once.
    The expert, who has to search, needs half of the horizon at most.
    """

    settings = {"labels": "words", "trajectories": 1000, "reflect_steps": 1500, "policy_steps": 200,
                "updates": 25, "rl_lr": 2e-3, "eval_every": 25}

    def __init__(self, games=None, milestone=0.0, horizon=0):
        self.house, self.engine = None, beside("alfworld/real_engine.py" if games else "alfworld/engine.py")
        if games:
            self.engine.import_alfworld()  # a missing package shows now, and not after the training
        tasks = self.engine.find_games(games) if games else shipped("alfworld/tasks.json.gz")
        # Real rooms are larger; 50 is what ALFWorld's authors use.
        super().__init__(tasks, horizon or (50 if games else 30), milestone=milestone)

    def groups(self, task):
        """The type, and whether training had this combination of object and target (known for built-in rooms)."""
        known = [f"{task['combination']} combination"] if "combination" in task else []
        return (task["type"].replace("_", " "), *known)

    def cluster(self, task):
        """The furniture: some tasks of a split are set in rooms that have the same."""
        return " ".join(task.get("receptacles", ())) or super().cluster(task)

    def begin(self, task, options):
        if not isinstance(task, dict):
            raise UserError(f"a task of ALFWorld is a dictionary with a room or a game, not {task!r}")
        self.milestone = options["milestone"]
        if self.house is None or self.house.task != task:  # to start the real engine anew would take a second
            self.house = self.engine.House(task)
        self.notes = Notes(self.house.reset())
        self.goal = self.house.goal  # None where it is not known
        self.reached = self.passed()  # what holds at the start is not an achievement
        self.actions = tuple(self.house.commands())

    def act(self, action):
        command = self.actions[action]
        self.notes.update(command, self.house.do(command))
        self.actions, self.success = tuple(self.house.commands()), self.house.won
        new = self.passed() - self.reached
        self.reached |= new  # each milestone is paid once
        return float(self.success) - 0.01 + self.milestone * len(new), self.success

    def render(self):
        notes, goal = self.notes, self.goal
        if goal:  # only what the task is about is listed: states stay short and repeat
            names = [goal["object"], goal["target"]]
        else:
            names = sorted(set(map(kind, itertools.chain(*notes.contents.values()))))
        seen = []
        for name in names:
            seen += [f"{notes.title(thing)} ({place})" for thing, place in notes.where(name).items()]
        here = f"{notes.here} (closed)" if notes.here in notes.shut else notes.here
        held = notes.title(notes.hand) if notes.hand else "nothing"
        if goal and notes.hand and kind(notes.hand) != goal["object"]:
            held += f" (from {notes.origin})"  # the expert takes a wrong object back: the policy must see the way, too
        searched = [place for place in notes.receptacles if place in notes.contents]
        return (
            f"Your task is to: {notes.sentence}.\n"
            f"Not searched: {', '.join(notes.unsearched()) or 'nothing'}.\n"
            f"Searched: {', '.join(searched) or 'nothing'}.\n"
            f"Seen: {', '.join(seen) or 'nothing'}.\n"
            f"In hand: {held}.\n"
            f"You are at: {here or 'the middle of the room'}.\n"
            f"Last action: {notes.command}.\n{notes.observation}"
        )

    def ready(self, thing):
        """Whether an object has had the treatment that the task asks for."""
        verb = treatment(self.goal["type"])
        return verb is None or TRAITS[verb] in self.notes.traits.get(thing, ())

    def passed(self):
        """The milestones that hold now, as far as the agent can know."""
        if self.goal is None:
            return set()
        notes, goal = self.notes, self.goal
        places = notes.where(goal["object"])
        taken = notes.hand is not None and kind(notes.hand) == goal["object"]
        treated = treatment(goal["type"]) and taken and self.ready(notes.hand)
        if goal["type"].startswith("look"):  # to have seen the lamp stands in for the treatment
            treated = notes.where(goal["target"])
        placed = False
        for thing, place in places.items():
            if kind(place) == goal["target"] and self.ready(thing):
                placed = True  # one of two objects is enough
        holds = {"found": places or taken, "taken": taken, "treated": treated, "placed": placed}
        return {name for name in holds if holds[name]}

    def subgoal(self):
        """What is to be done next, from what was seen: `(verb, thing, place)`.

        Verbs: `find` (a kind, no place), `take`, `drop` (what is in the way), `clean`, `heat`, `cool`, `place`, `use`.
        """
        notes, goal = self.notes, self.goal
        if goal is None:
            raise UserError(f"no search expert for {notes.sentence!r}, which is not one of ALFWorld's templates")
        verb, wanted, held = "take", goal["object"], notes.hand
        if held and kind(held) != wanted:
            # A wrong object goes down here if it may, else back to its place: there it certainly may.
            return "drop", held, notes.here if f"move {held} to {notes.here}" in self.actions else notes.origin
        # Things go to the receptacle of the right kind that holds most of them already.
        done = [place for thing, place in notes.where(wanted).items() if self.ready(thing)]
        places = [place for place in notes.receptacles if kind(place) == goal["target"]]
        target = max(places, key=done.count, default=None)  # the first of equals
        if held and goal["type"].startswith("look"):
            verb, wanted = "use", goal["target"]
        elif held and not self.ready(held):
            verb = treatment(goal["type"])
            return verb, held, f"{STATIONS[verb]} 1"
        elif held:
            return "place", held, target
        # Empty hands, or a lamp to be found. An object that is ready and at the target stays there.
        found = {t: place for t, place in notes.where(wanted).items() if place != target or not self.ready(t)}
        if not found:
            return "find", wanted, None
        # Prefer what is here, then what is already treated.
        thing = min(found, key=lambda t: (found[t] != notes.here, not notes.traits.get(t)))
        return verb, thing, found[thing]

    def expert_action(self):
        """The next command of a sensible person who knows only what was shown: searches likely places in order."""
        verb, thing, place = self.subgoal()
        if verb == "find":
            place = next(iter(likely(thing, self.notes)), None)
        # The last step of the errand comes first: of its four forms only the one that is meant is admissible. Then the
        # way there. Official rooms have places side by side: one can use the second from the first, and not go to it.
        wishes = [f"{verb} {thing} with {place}", f"use {thing}", f"take {thing} from {place}"]
        wishes += [f"move {thing} to {place}", f"open {place}", f"go to {place}", f"examine {place}", "look"]
        return self.actions.index(next(wish for wish in wishes if wish in self.actions))


# ---------------------------------------------------------------------------------------------------------
# Making and playing

ENVS = {"taxi": DangerousTaxi, "autoexplore": AutoExplore, "alfworld": ALFWorld}
OWN_MODULES = set()  # modules of environments that were loaded as package.module:Class


def env_class(name):
    """An environment's class by short name, Gymnasium's as `gym:ID`, or yours as `package.module:Class`."""
    if name in ENVS:
        return ENVS[name]
    if name.startswith("gym:"):
        return beside("../examples/gym_text.py").env_of(name)
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(f"unknown environment {name!r}: one of {', '.join(ENVS)}, gym:ID, or package.module:Class")
    module_name, attribute = name.split(":")
    # The current directory comes last, so that no file in it takes the place of an installed package.
    if "." not in sys.path and "" not in sys.path:
        sys.path.append(".")
    OWN_MODULES.add(module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the environment itself imports and misses is its author's concern: with traceback.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"cannot load environment {name!r}: {error}") from None
    found = getattr(module, attribute, None)  # checked before it is called: `os:system` is a name too
    if not isinstance(found, type) or not issubclass(found, Env):
        raise UserError(f"cannot load environment {name!r}: {attribute} is not a subclass of envs.Env")
    return found


def make(name, **options):
    """A new environment; options go to its constructor."""
    cls = env_class(name)
    signature = inspect.signature(cls)
    try:  # before the call, because a TypeError inside the constructor is its author's concern
        signature.bind(**options)
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take these options {options}: {error}") from None
    for key, parameter in signature.parameters.items():
        # On the command line a number may be misspelt, and would end in a TypeError much later.
        value, number = options.get(key, parameter.default), (int, float)
        if isinstance(parameter.default, number) and not isinstance(value, number):
            raise UserError(f"{key} of environment {name!r} must be a number, not {value!r}")
    return cls(**options)


def run_main(main):
    """Run a script's `main`: what the user can mend ends with one line and exit code 2, Ctrl-C with 130."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows escapes
    try:
        main()
        print(end="", flush=True)  # now, so that a closed pipe is an error here
        return
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except (UserError, OSError) as error:
        modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, OSError) and OWN_MODULES.intersection(modules):
            raise  # the author of an environment needs to see where it failed
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as in `| head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes
            sys.exit(1)
        line, code = "error: " + " ".join(str(error).split()), 2
    print(line, file=sys.stderr)
    sys.exit(code)


def key_and_value(text):
    """`KEY=VALUE` of `--env-option`; the value is read as JSON where it can be, as a text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main():
    parser = argparse.ArgumentParser(description="Play an environment by hand.", allow_abbrev=False)
    names = ", ".join(ENVS)
    parser.add_argument("--env", default="taxi", help=f"{names}, gym:ID, or package.module:Class (default: taxi)")
    more = {"type": key_and_value, "action": "append", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--env-option", help="option of its constructor, repeatable, such as mode=pickup", **more)
    parser.add_argument("--repos", metavar="DIR", help="AutoExplore: a directory of yours")
    parser.add_argument("--split", default="train", help="split of the task: train, valid or test (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="which task of the split, and the env's seed (default: 0)")
    args = parser.parse_args()
    if args.repos:
        args.env_option.append(("repos", args.repos))
    env = make(args.env, **dict(args.env_option))
    tasks = env.tasks(args.split)
    if not tasks:
        raise UserError(f"{args.env} has no tasks in its {args.split} split")
    state, info = env.reset(seed=args.seed, options={"task": tasks[args.seed % len(tasks)]})
    total, over = 0.0, False
    while not over:
        print(f"\n{state}")
        for i, text in enumerate(info["actions"]):
            print(f"  {i}  {text}")
        try:
            answer = input("action number (q quits, e asks the expert): ").strip()
        except EOFError:
            return
        if answer == "q":
            return
        if answer == "e":
            print("the expert would: " + info["actions"][env.expert_action()])
        elif answer in map(str, range(len(info["actions"]))):
            state, reward, terminated, truncated, info = env.step(int(answer))
            total, over = total + reward, terminated or truncated
            print(f"reward {reward:+.2f}")
        else:
            print(f"please type a number from 0 to {len(info['actions']) - 1}")
    print(f"\n{state}\n{'success' if info['success'] else 'failure'}, return {total:+.2f}")


if __name__ == "__main__":
    import envs  # what an environment of your own imports: another copy than this one, with another `UserError`

    envs.run_main(envs.main)
