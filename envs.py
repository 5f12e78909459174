"""Text environments: the contract, DangerousTaxi, and ALFWorld.

An agent reads a `state` (text), picks one of `info["actions"]` (a tuple of texts) by its index, and gets a
reward. The signature is Gymnasium's, without the dependency:

    state, info = env.reset(seed=0, options={"task": task})
    state, reward, terminated, truncated, info = env.step(action)

`terminated` means that the task itself ended (well or badly), `truncated` that the horizon was reached.
`info["success"]` is the environment's own verdict; nobody should infer it from the return.

DangerousTaxi (paper, section 5.2) is Gymnasium's Taxi-v3 in which any useless move is fatal. Deviation: the
paper does not give its map text; ours is Taxi-v3's own with five letters laid over it (see `DangerousTaxi`).

ALFWorld (section 5.3) is played on a built-in engine that speaks its language on rooms drawn from a seed, or on the
real one. Deviation: the state is not the history but notes of it (see `ALFWorld`), so that it repeats and stays short.

    python envs.py --env taxi              # play it by hand
    python envs.py --env alfworld          # with --games PATH: the real engine
"""

import argparse
import collections
import functools
import importlib
import importlib.metadata
import json
import pathlib
import random
import re
import sys
import types
import zlib


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2 (see `run_main`)."""


class Env:
    """The contract. Subclass it (or imitate it: nothing checks the type) to bring an environment of your own.

    Required: `reset`, `step`, `tasks`. `expert_action` is needed for teacher data, `describe` only for the
    corpus of the base LM. A task is any JSON-serialisable value; options are the reset options of a
    curriculum stage, such as `{"mode": "pickup"}`.
    """

    horizon = 30  # steps after which an episode is truncated

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
        """True, plain sentences about the current state (a list); no advice. Corpus of the base LM only."""
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
        facts = [f"The taxi is at row {row} column {col}.",
                 "The passenger is on board." if passenger == ON_BOARD else "The passenger is waiting."]
        for name, (r, c) in places.items():
            facts += [f"The {name} is at row {r} column {c}.", f"The {name} is {taxi_offset(row, col, r, c)}."]
        blocked = [self.actions[a][5:] for a in MOVES if taxi_move(row, col, a) == (row, col)]
        facts.append(f"Blocked: {', '.join(blocked) or 'nothing'}.")
        for a in MOVES:
            r, c = taxi_move(row, col, a)
            facts.append(f"To {self.actions[a]} " + ("is blocked." if (r, c) == (row, col) else f"leads to row {r} column {c}."))
        return facts


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
# ALFWorld

STATIONS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}  # verb -> the receptacle that does it
TRAITS = {"clean": "clean", "heat": "hot", "cool": "cool"}  # verb -> what the object is afterwards
THING = r"[a-z]+ \d+"


@functools.cache
def household():
    """The tables of data/alfworld.json in lower case (names as the game shows them), and `camel`: the names in PDDL."""
    text = (pathlib.Path(__file__).parent / "data" / "alfworld.json").read_text(encoding="utf-8")
    return json.loads(text.lower()) | {"camel": {name.lower(): name for name in re.findall(r'"([A-Z]\w+)"', text)}}


def kind(thing):
    """`tomato` of `tomato 1`."""
    return thing.split()[0]


def in_order(things):
    """Sorted by name, then by number: `shelf 2` before `shelf 10`."""
    return sorted(things, key=lambda thing: (kind(thing), int(thing.split()[1])))


def listing(things):
    """ALFWorld's enumeration. It prints in the order of a Python set; ours is sorted."""
    words = [f"a {thing}" for thing in in_order(things)]
    return "nothing" if not words else words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]


def sort_lists(observation):
    """An observation of the real engine with its enumerations in our order: theirs changes with PYTHONHASHSEED."""
    several = rf"a {THING}(?:,(?: and)? a {THING})+"
    return re.sub(several, lambda match: listing(re.findall(rf"a ({THING})", match[0])), observation)


def goal_of(sentence):
    """`{"type", "object", "target"}` of a task sentence in ALFWorld's templates, None for free text. The target of
    `look_at_obj_in_light` is the lamp."""
    for name, templates in household()["sentences"].items():
        for template in templates:
            pattern = template.format(object=r"(?P<object>\w+)", target=r"(?P<target>\w+)")
            if match := re.fullmatch(pattern, sentence):
                return {"type": name, **match.groupdict()}
    return None


def treatment(type_name):
    """The verb of a task type (`clean`, `heat`, `cool`), or None."""
    return next((verb for verb in STATIONS if f"_{verb}_" in type_name), None)


def combinations(type_name):
    """All `(room, object, target)` that make a sensible task of a type, in the order of the tables."""
    tables, verb, found = household(), treatment(type_name), []
    for room, homes in tables["homes"].items():
        lamps = [thing for thing in homes if thing.endswith("lamp")]
        targets = lamps if type_name.startswith("look") else tables["rooms"][room]
        for thing in (thing for thing in homes if thing not in lamps):
            if verb and (thing not in tables[verb + "able"] or STATIONS[verb] not in tables["rooms"][room]):
                continue
            found += [(room, thing, target) for target in targets
                      if target in lamps or (thing in tables["holds"][target] and target != STATIONS.get(verb))]
    return found


def draw_receptacles(task, rng):
    """Names of the receptacles of a room: 6 to 10 (times `size`), among them the target and a home of the object."""
    tables, size = household(), task.get("size", 1)
    homes = tables["homes"][task["room"]]
    needed = set(homes.get(task["target"], [task["target"]]))  # a lamp needs a place of its own
    start = set(homes[task["object"]]) - {task["target"]}
    while True:
        names = []
        for name, (low, high) in tables["rooms"][task["room"]].items():
            count = rng.randint(low, high if low == high else high * size)
            names += [f"{name} {number}" for number in range(1, count + 1)]
        kinds = {kind(name) for name in names}
        if 6 * size <= len(names) <= 10 * size and kinds & needed and kinds & start:
            return names


@functools.lru_cache(maxsize=4096)
def furnish(key):
    """The room of a task (as sorted JSON): `(receptacles, {object: receptacle})`, drawn from its seed. Objects lie
    where such objects are kept, at most four in one place; those that the task asks for never start at its target."""
    task, rng = json.loads(key), random.Random(key)
    receptacles = draw_receptacles(task, rng)
    homes, places = household()["homes"][task["room"]], {}

    def place(thing, count):
        for number in range(1, count + 1):
            free = [r for r in receptacles if kind(r) in homes[thing] and list(places.values()).count(r) < 4
                    and not (thing == task["object"] and kind(r) == task["target"])]
            if free:
                places[f"{thing} {number}"] = rng.choice(free)

    place(task["object"], (2 if "two" in task["type"] else 1) + (rng.random() < 0.3))
    if task["target"] in homes:
        place(task["target"], 1)
    for thing in rng.sample(sorted(homes), len(homes)):
        if thing not in (task["object"], task["target"]) and len(places) < 9 * task.get("size", 1):
            place(thing, rng.choice((1, 1, 2)))
    return receptacles, places


def room_of(task):
    """`furnish` for a task that is checked, whatever else (such as `combination`) its dictionary carries."""
    wanted = {name: task.get(name) for name in ("type", "room", "object", "target", "seed")}
    wanted["size"] = task.get("size", 1)
    allowed = combinations(wanted["type"]) if wanted["type"] in household()["sentences"] else ()
    if (wanted["room"], wanted["object"], wanted["target"]) not in allowed or not isinstance(wanted["seed"], int):
        raise UserError(f"not a household task: {task!r} (envs.combinations lists what a type allows)")
    return furnish(json.dumps(wanted, sort_keys=True))


class House:
    """The built-in engine: ALFWorld's rules and sentences (its `alfred.pddl` and `alfred.twl2`) for one room.

    Left out: `help`, `slice` and things inside bowls. Parity with the real engine, command by command, is a test.
    """

    def __init__(self, task):
        self.task = task
        self.receptacles, self.start = room_of(task)
        templates = household()["sentences"][task["type"]]
        self.sentence = templates[task["seed"] % len(templates)].format(**task)

    def reset(self):
        self.places = dict(self.start)  # object -> receptacle; what the agent holds is in no place
        self.here = self.hand = None
        self.opened, self.lit, self.traits = set(), set(), {thing: set() for thing in self.start}
        return ("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
                f"you see {listing(self.receptacles)}.\n\nYour task is to: {self.sentence}.")

    def inside(self, receptacle):
        return [thing for thing, place in self.places.items() if place == receptacle]

    def shut(self, receptacle):
        return kind(receptacle) in household()["openable"] and receptacle not in self.opened

    def commands(self):
        """The admissible commands, sorted as the real engine sorts them."""
        here, hand, tables = self.here, self.hand, household()
        found = {"look", "inventory"} | {f"go to {name}" for name in self.receptacles if name != here}
        found |= {f"examine {hand}"} if hand else set()  # in hand only: alfred.pddl's examineObject has a stray comma
        if here:
            found |= {f"examine {here}"} | {f"use {thing}" for thing in self.inside(here) if "lamp" in thing}
            if kind(here) in tables["openable"]:
                found.add(f"{'open' if self.shut(here) else 'close'} {here}")
            if hand:
                found |= {f"{verb} {hand} with {here}" for verb, station in STATIONS.items()
                          if kind(here) == station and kind(hand) in tables[verb + "able"]}
        if here and not self.shut(here):
            if not hand:
                found |= {f"take {thing} from {here}" for thing in self.inside(here) if "lamp" not in thing}
            elif kind(hand) in tables["holds"][kind(here)]:
                found.add(f"move {hand} to {here}")
        return sorted(found)

    def do(self, command):
        """Carry out a command; the observation. What is not admissible changes nothing, as in ALFWorld."""
        if command not in self.commands():
            return "Nothing happens."
        verb, things = command.split()[0], re.findall(THING, command)
        return self.do_treat(verb, *things) if verb in STATIONS else getattr(self, "do_" + verb)(*things)

    def do_look(self):
        if self.here:
            return f"You are facing the {self.here}. Next to it, you see nothing."
        return "You are in the middle of a room. Looking quickly around you, you see nothing."

    def do_inventory(self):
        return f"You are carrying: a {self.hand}." if self.hand else "You are not carrying anything."

    def do_examine(self, thing):
        if thing == self.hand:
            return self.examine_hand()
        if self.shut(thing):
            return f"The {thing} is closed."
        start = f"The {thing} is open. In it" if thing in self.opened else f"On the {thing}"
        return f"{start}, you see {listing(self.inside(thing))}."

    def examine_hand(self):
        thing, traits = self.hand, self.traits[self.hand]
        if kind(thing) in household()["containers"]:
            return f"This is a normal {thing}. In it, you see nothing."
        if not traits:
            return f"There's nothing special about {thing}."
        words = "cold" if traits == {"cool"} else " and ".join(w for w in ("hot", "cool", "clean") if w in traits)
        return f"This is a {words} {thing}."

    def do_go(self, receptacle):
        self.here = receptacle
        return f"You arrive at {receptacle}. {self.do_examine(receptacle)}"

    def do_open(self, receptacle):
        self.opened.add(receptacle)
        return f"You open the {receptacle}. {self.do_examine(receptacle)}"

    def do_close(self, receptacle):
        self.opened.discard(receptacle)
        return f"You close the {receptacle}."

    def do_take(self, thing, receptacle):
        self.hand = thing
        del self.places[thing]
        return f"You pick up the {thing} from the {receptacle}."

    def do_move(self, thing, receptacle):
        self.hand = None
        self.places[thing] = receptacle
        return f"You move the {thing} to the {receptacle}."

    def do_use(self, lamp):
        self.lit.add(lamp)  # ALFWorld's goal asks whether a lamp was ever used, so a second `use` says the same
        return f"You turn on the {lamp}."

    def do_treat(self, verb, thing, receptacle):
        if verb != "clean":
            self.traits[thing] -= {"hot", "cool"}
        self.traits[thing].add(TRAITS[verb])
        return f"You {verb} the {thing} using the {receptacle}."

    @property
    def won(self):
        goal, trait = self.task, TRAITS.get(treatment(self.task["type"]))
        if goal["type"].startswith("look"):  # the lamp was used, the agent is beside it, the object in hand
            lit = [lamp for lamp in self.lit if kind(lamp) == goal["target"] and self.places[lamp] == self.here]
            return bool(lit and self.hand) and kind(self.hand) == goal["object"]
        done = [place for thing, place in self.places.items() if kind(thing) == goal["object"]
                and kind(place) == goal["target"] and (trait is None or trait in self.traits[thing])]
        return any(done.count(place) >= (2 if "two" in goal["type"] else 1) for place in done)

    def close(self):
        pass


class Notes:
    """What an agent in a house knows: read off ALFWorld's sentences, so it is the same on both engines."""

    def __init__(self, opening):
        room, _, task = opening.partition("Your task is to: ")
        self.sentence = task.strip().removesuffix(".")
        self.receptacles = in_order(re.findall(rf"a ({THING})", room))
        self.contents = {}  # receptacle -> objects last seen there; a receptacle that was never looked into is missing
        self.shut, self.lit, self.traits = set(), set(), {}
        self.here = self.hand = self.origin = None
        self.command, self.observation = "none", "You are in the middle of a room."

    def update(self, command, observation):
        """Take in what a command did."""
        self.command, self.observation = command, observation
        for pattern, learn in self.sentences.items():
            if match := re.search(pattern, observation):
                learn(self, *match.groups())

    def see(self, receptacle, things):
        self.contents[receptacle] = re.findall(rf"a ({THING})", things)
        self.shut.discard(receptacle)

    def take(self, thing, receptacle):
        self.hand, self.origin = thing, receptacle
        if thing in self.contents.get(receptacle, ()):
            self.contents[receptacle].remove(thing)

    def put(self, thing, receptacle):
        self.hand = None
        self.contents.setdefault(receptacle, []).append(thing)

    def treat(self, verb, thing):
        gone = set() if verb == "clean" else {"hot", "cool"}
        self.traits[thing] = self.traits.get(thing, set()) - gone | {TRAITS[verb]}

    sentences = {
        rf"You arrive at ({THING})\.": lambda self, place: setattr(self, "here", place),
        rf"(?:On the |The )({THING})(?: is open\. In it)?, you see (.*)\.": see,
        rf"The ({THING}) is closed\.": lambda self, place: self.shut.add(place),
        rf"You close the ({THING})\.": lambda self, place: self.shut.add(place),
        rf"You pick up the ({THING}) from the ({THING})\.": take,
        rf"You move the ({THING}) to the ({THING})\.": put,
        rf"You (clean|heat|cool) the ({THING}) using": treat,
        rf"You turn on the ({THING})\.": lambda self, lamp: self.lit.add(lamp),
    }

    def unsearched(self):
        return [place for place in self.receptacles if place not in self.contents]

    def where(self, name):
        """`{object: receptacle}` of all objects of a kind that were seen and are still there."""
        return {thing: place for place in self.receptacles for thing in in_order(self.contents.get(place, ()))
                if kind(thing) == name}

    def title(self, thing):
        """An object with what was done to it: `clean hot tomato 1`, `lit desklamp 1`."""
        return " ".join(["lit"] * (thing in self.lit) + sorted(self.traits.get(thing, ())) + [thing])


def homes_of(name):
    """The kinds of receptacle where an object is kept in any room, most usual first."""
    return list(dict.fromkeys(home for table in household()["homes"].values() for home in table.get(name, ())))


def likely(name, places):
    """`places` in the order in which one would look for an object: where it is usually kept, then the rest."""
    rank = {home: number for number, home in enumerate(homes_of(name))}
    return sorted(places, key=lambda place: rank.get(kind(place), len(rank)))  # stable: keeps the order of the names


class ALFWorld(Env):
    """Household tasks in ALFWorld's language, on the built-in engine or, with `games=PATH`, on the real one.

    A task is `{"type", "room", "object", "target", "seed"}` (and `size`; `combination` says whether the train split
    has this object and target for this type), or `{"game": path of a game.tw-pddl}`. The state is not the history:
    it is the task, what was searched and found so far, what is in hand, and the last command with its observation.
    Reward: 1 when the task is done, -0.01 a step, and `milestone` for each of found, taken, treated, placed, once.
    Horizon 30: the expert, who has to search, needs 7.6 steps on average and 15 at most by default.
    """

    counts = {"train": 300, "valid": 10, "test": 20}  # tasks of each of the six types
    milestones = ("found", "taken", "treated", "placed")

    def __init__(self, games=None, expert="search", milestone=0.0, horizon=None, size=1):
        if expert != "search" and not games:
            raise UserError(f"expert {expert!r} of ALFWorld needs real games: give games=PATH too")
        if expert not in ("search", "planner", "handcoded"):
            raise UserError(f"unknown expert {expert!r} of ALFWorld: one of search, planner, handcoded")
        self.games = None if games is None else find_games(games)
        if games:
            import_alfworld()  # better to miss it now than after the training
        self.expert, self.size, self.default_milestone = expert, size, milestone
        self.horizon = horizon or (50 if games else 30 * size)  # 50 is what ALFWorld's authors use
        self.rng = random.Random()
        self.house, self.done = None, True

    def tasks(self, split):
        if split not in self.counts:
            raise UserError(f"unknown split {split!r}: one of {', '.join(self.counts)}")
        if self.games is None:
            return [dict(task) for task in household_tasks(split, self.counts[split], self.size)]
        if not self.games[split]:
            raise UserError(f"no game of split {split!r} in the games directory: there are "
                            + ", ".join(f"{len(found)} of split {name}" for name, found in self.games.items()))
        return list(self.games[split])

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = random.Random(seed)
        self.milestone = (options or {}).get("milestone", self.default_milestone)
        task = task_of(self, options)
        if not isinstance(task, dict):
            raise UserError(f"a task of ALFWorld is a dictionary with a type or a game, not {task!r}")
        if self.house is None or self.house.task != task:
            if self.house:
                self.house.close()
            self.house = TextWorldGame(task, self.expert) if "game" in task else House(task)
        self.notes = Notes(self.house.reset())
        self.goal = goal_of(self.notes.sentence) or getattr(self.house, "goal", None)
        self.steps, self.done, self.success, self.reached = 0, False, False, set()
        self.reached = self.passed()  # what holds at the start is not an achievement
        self.actions = tuple(self.house.commands())
        return self.render(), self.info()

    def step(self, action):
        check_action(self, action, self.actions)
        self.notes.update(self.actions[action], self.house.do(self.actions[action]))
        self.actions, self.success = tuple(self.house.commands()), self.house.won
        new = self.passed() - self.reached
        self.reached |= new
        self.steps += 1
        truncated = not self.success and self.steps >= self.horizon
        self.done = self.success or truncated
        reward = float(self.success) - 0.01 + self.milestone * len(new)
        return self.render(), reward, self.success, truncated, self.info()

    def info(self):
        return {"actions": self.actions, "success": self.success, "milestones": tuple(sorted(self.reached))}

    def render(self):
        notes, goal = self.notes, self.goal
        names = [goal["object"], goal["target"]] if goal else {kind(t) for c in notes.contents.values() for t in c}
        seen = [f"{notes.title(thing)} ({place})" for name in names for thing, place in notes.where(name).items()]
        here = f"{notes.here} (closed)" if notes.here in notes.shut else notes.here
        held = notes.title(notes.hand) if notes.hand else "nothing"
        if goal and notes.hand and kind(notes.hand) != goal["object"]:
            held += f" (from {notes.origin})"  # the way back, which the expert knows, is for the policy to see, too
        return "\n".join([
            f"Your task is to: {notes.sentence}.",
            f"Not searched: {', '.join(notes.unsearched()) or 'nothing'}.",
            f"Searched: {', '.join(place for place in notes.receptacles if place in notes.contents) or 'nothing'}.",
            f"Seen: {', '.join(seen) or 'nothing'}.",
            f"In hand: {held}.",
            f"You are at: {here or 'the middle of the room'}.",
            f"Last action: {notes.command}.",
            notes.observation,
        ])

    def ready(self, thing):
        """Whether an object has had the treatment that the task asks for."""
        verb = treatment(self.goal["type"])
        return verb is None or TRAITS[verb] in self.notes.traits.get(thing, ())

    def passed(self):
        """The milestones that hold now, as far as the agent can know; `treated` is having seen the lamp in its task."""
        if self.goal is None:
            return set()
        notes, name, target = self.notes, self.goal["object"], self.goal["target"]
        places = notes.where(name)
        taken = bool(notes.hand) and kind(notes.hand) == name
        treated = treatment(self.goal["type"]) and taken and self.ready(notes.hand)
        if self.goal["type"].startswith("look"):
            treated = notes.where(target)
        placed = any(kind(place) == target and self.ready(thing) for thing, place in places.items())
        return {m for m, holds in zip(self.milestones, (places or taken, taken, treated, placed), strict=True) if holds}

    def subgoal(self):
        """What is to be done next, from what was seen: `(verb, thing, place)`.

        Verbs: `find` (a kind, no place), `take`, `drop` (what is in the way), `clean`, `heat`, `cool`, `place`, `use`.
        """
        notes, goal = self.notes, self.goal
        if goal is None:
            raise UserError(f"no search expert for {notes.sentence!r}, which is not one of ALFWorld's templates")
        verb, wanted, target = "take", goal["object"], self.best_target()
        if notes.hand and kind(notes.hand) != wanted:
            fits_here = f"move {notes.hand} to {notes.here}" in self.actions
            return "drop", notes.hand, notes.here if fits_here else notes.origin
        if notes.hand and goal["type"].startswith("look"):
            verb, wanted = "use", goal["target"]
        elif notes.hand and not self.ready(notes.hand):
            verb = treatment(goal["type"])
            return verb, notes.hand, f"{STATIONS[verb]} 1"
        elif notes.hand:
            return "place", notes.hand, target
        found = {t: place for t, place in notes.where(wanted).items() if place != target or not self.ready(t)}
        if not found:
            return "find", wanted, None
        thing = min(found, key=lambda t: (found[t] != notes.here, not notes.traits.get(t)))  # here, or already treated
        return verb, thing, found[thing]

    def best_target(self):
        """The receptacle to bring things to: the one that holds most of them already, else the first of its kind."""
        done = [place for thing, place in self.notes.where(self.goal["object"]).items() if self.ready(thing)]
        places = [place for place in self.notes.receptacles if kind(place) == self.goal["target"]]
        return max(places, key=done.count, default=None)

    def expert_command(self):
        """The next command of a sensible person who knows only what was shown: searches likely places in order.

        It is the first admissible one of what it takes, last step first. (Official rooms have places side by side:
        there one can use the second from the first, and cannot go to it.)
        """
        verb, thing, place = self.subgoal()
        if verb == "find":
            left = likely(thing, self.notes.unsearched())
            place = self.notes.here if self.notes.here in left else next(iter(left), None)
            wishes = [f"open {place}", f"go to {place}", f"examine {place}", "look"]
        else:
            steps = {"use": f"use {thing}", "take": f"take {thing} from {place}"}
            steps |= dict.fromkeys(("place", "drop"), f"move {thing} to {place}")
            wishes = [steps.get(verb, f"{verb} {thing} with {place}"), f"open {place}", f"go to {place}"]
        return next((wish for wish in wishes if wish in self.actions), wishes[-1])

    def expert_action(self):
        command = self.expert_command() if self.expert == "search" else self.house.expert_command()
        if command not in self.actions:
            raise RuntimeError(f"the expert asks for {command!r}, which is not admissible here:\n{self.render()}")
        return self.actions.index(command)

    def describe(self):
        notes, goal = self.notes, self.goal
        facts = [f"You are at {notes.here or 'the middle of the room'}.",
                 f"In hand is {notes.title(notes.hand) if notes.hand else 'nothing'}.",
                 f"{len(notes.unsearched())} places are not searched."]
        if notes.here and kind(notes.here) in household()["openable"]:
            facts.append(f"{notes.here} is {'closed' if notes.here in notes.shut else 'open'}.")
        for place in notes.receptacles:
            things = notes.contents.get(place)
            if things is None:
                facts.append(f"{place} is not searched.")
            elif place == notes.here and place not in notes.shut:
                facts.append(f"On {place} there is {', '.join(in_order(things)) or 'nothing'}.")
            else:
                facts.append(f"{place} is searched.")
        return facts + (self.describe_goal() if goal else [])

    def describe_goal(self):
        """Sentences about the task: what it asks for, where such things are kept, what of it was seen."""
        notes, goal = self.notes, self.goal
        verb, lamp = treatment(goal["type"]), goal["type"].startswith("look")
        facts = [f"The task is about {'two' if 'two' in goal['type'] else 'a'} {goal['object']}.",
                 f"The {'lamp is a' if lamp else 'target is the'} {goal['target']}."]
        if verb:
            facts.append(f"It must be {TRAITS[verb]}: a {STATIONS[verb]} can {verb} it.")
        kinds = {kind(place) for place in notes.receptacles}
        for name in (goal["object"], goal["target"]):
            homes = [home for home in homes_of(name) if home in kinds]
            if homes:
                facts.append(f"A {name} is often in the {', '.join(homes)}.")
            if homes or name == goal["object"]:
                seen = [f"{notes.title(thing)} is in {place}." for thing, place in notes.where(name).items()]
                held = bool(notes.hand) and kind(notes.hand) == name
                facts += seen or [f"The {name} is in hand." if held else f"No {name} was seen."]
        return facts


LAYOUTS = {"train": range(7), "valid": range(7, 8), "test": range(8, 10)}  # classes of furniture (`layout_class`)


def layout_class(receptacles):
    """Which of ten classes the furniture of a room falls in. The splits use different classes, so that a test room is
    not a training room with other things in it."""
    return zlib.crc32(" ".join(receptacles).encode()) % 10


@functools.cache
def household_tasks(split, count, size):
    """`count` tasks of every type for a split. A fifth of each type's (room, object, target) combinations never occurs
    in training; every second test task has one of those, and says so in `combination`."""
    tasks, seed = [], {"train": 0, "valid": 1_000_000, "test": 2_000_000}[split]
    for type_name in household()["sentences"]:
        pool = combinations(type_name)
        random.Random(0).shuffle(pool)
        cut = len(pool) // 5
        unseen, seen = pool[:cut], pool[cut:cut + ALFWorld.counts["train"]]
        for number in range(count):
            new = split == "test" and number % 2 == 1
            chosen = unseen[number // 2 % len(unseen)] if new else seen[number % len(seen)]
            task = {"type": type_name, **dict(zip(("room", "object", "target"), chosen, strict=True)), "size": size}
            while layout_class(room_of(task | {"seed": seed})[0]) not in LAYOUTS[split]:
                seed += 1
            tasks.append(task | {"seed": seed, "combination": "unseen" if new else "seen"})
            seed += 1
    return tasks


# Game files and the real engine: everything from here to the end of ALFWorld needs the optional package.

ALFWORLD_PIN = "alfworld==0.4.2 textworld==1.7.0"


def import_alfworld():
    """The parts of the optional `alfworld` package that we use, after a check of its version."""
    try:
        version = importlib.metadata.version("alfworld")
        import textworld
        from alfworld import info
        from alfworld.agents.environment import alfred_tw_env
        from alfworld.gen import goal_library
    except (ImportError, OSError) as error:  # a missing package; alfworld makes a folder in ~/.cache when imported
        raise UserError(f"real ALFWorld games need alfworld ({error}): pip install {ALFWORLD_PIN}") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 4):
        raise UserError(f"alfworld {version} is too old (it says `put`, not `move`): pip install {ALFWORLD_PIN}")
    return types.SimpleNamespace(textworld=textworld, info=info, tw=alfred_tw_env, goals=goal_library.gdict)


def find_games(path):
    """The tasks of a directory of real games, `{split: [task]}`, found by their `game.tw-pddl` in sorted order.

    A folder named train, valid (or valid_seen), test (or valid_unseen) on the way to a game names its split, as in the
    official data; without one a game belongs to the test split. What ALFWorld itself leaves out (unsolvable games, and
    those with slices or movable receptacles) is left out here, and named.
    """
    root, folders = pathlib.Path(path), {"valid_seen": "valid", "valid_unseen": "test"}
    files = [root] if root.is_file() else sorted(root.rglob("*.tw-pddl"))
    if not files:
        raise UserError(f"no game file (*.tw-pddl) in {str(path)!r}")
    games, left_out = {"train": [], "valid": [], "test": []}, []
    for file in files:
        names = [folders.get(name, name) for name in file.relative_to(root).parts]
        if not read_json(file).get("solvable", True) or re.search("movable|Sliced", " ".join(names)):
            left_out.append(str(file))
            continue
        data = traj_data(file)
        task = {"type": data.get("task_type", "unknown"), "game": str(file)}
        if "task" in data:  # written by us
            task["combination"] = data["task"].get("combination", "unknown")
        games[next((name for name in names if name in games), "test")].append(task)
    if left_out:
        print(f"note: {len(left_out)} games that ALFWorld leaves out: {', '.join(left_out)}", file=sys.stderr)
    return games


def read_json(file):
    try:
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the game file {str(file)!r}: {error}") from None


def traj_data(file):
    """The `traj_data.json` beside a game, or an empty dictionary."""
    beside = pathlib.Path(file).with_name("traj_data.json")
    return read_json(beside) if beside.exists() else {}


def goal_beside(file):
    """What `goal_of` gives, from a game's traj_data.json: for task sentences written by people."""
    data = traj_data(file)
    if not data:
        return None
    params = data["pddl_params"]
    target = params["toggle_target" if data["task_type"].startswith("look") else "parent_target"]
    return {"type": data["task_type"], "object": params["object_target"].lower(), "target": target.lower()}


class TextWorldGame:
    """The real engine behind the interface of `House`: one game file, played by TextWorld.

    Experts: `planner` knows the whole room and is optimal; `handcoded` is ALFWorld's own heuristic (in 0.4.2 it still
    waits for the word `put` and mostly fails to place two objects); `search` is ours and needs nothing from here.
    """

    def __init__(self, task, expert="search"):
        self.task, self.expert = task, expert
        alf = import_alfworld()
        read_json(task["game"])  # a missing or broken file is the user's error, not TextWorld's
        self.goal = goal_beside(task["game"])
        if expert == "handcoded" and not self.goal:
            raise UserError(f"the hand-coded expert needs a traj_data.json beside {task['game']!r}")
        wanted = alf.textworld.EnvInfos(won=True, admissible_commands=True, policy_commands=expert == "planner")
        wrappers = [alf.tw.AlfredDemangler()]
        if expert != "search":
            wrappers.append(alf.tw.AlfredExpert(expert_type=expert))
        self.env = alf.textworld.start(task["game"], request_infos=wanted, wrappers=wrappers)

    def reset(self):
        self.rng = random.Random(0)
        return self.play(self.env.reset)

    def do(self, command):
        return self.play(lambda: self.env.step(command)[0])

    def play(self, call):
        """Call the engine with `random` in a state of our own: the hand-coded expert draws from the global one."""
        before = random.getstate()
        random.setstate(self.rng.getstate())
        try:
            self.state = call()
        finally:
            self.rng.setstate(random.getstate())
            random.setstate(before)
        return sort_lists(self.state.feedback)

    def commands(self):
        return [command for command in self.state.admissible_commands if command != "help"]

    def expert_command(self):
        plan = self.state["extra.expert_plan"]
        if not plan:
            raise RuntimeError(f"the {self.expert} expert has no plan in this state of {self.task['game']}")
        return "look" if plan[0] == "help" else plan[0]  # the hand-coded one, at a loss, draws any admissible command

    @property
    def won(self):
        return bool(self.state.won)

    def close(self):
        self.env.close()


def pddl_ids(names):
    """PDDL identifiers that ALFWorld turns back into our names: it numbers things of a kind by falling identifier."""
    ids = {}
    for name in names:
        rank = sum(kind(other) == kind(name) for other in names) - int(name.split()[1])
        camel = household()["camel"][kind(name)]
        start, end = (camel[:-5], f"_bar_{camel}") if camel.endswith("Basin") else (camel, "")
        ids[name] = f"{start}_bar__plus_00_dot_{rank:02d}{end}"
    return ids


def pddl_objects(task, ids, at):
    """The typed objects of a room's PDDL problem. The domain itself names three stations and two knives."""
    camel, (receptacles, places) = household()["camel"], room_of(task)
    kinds = {"rtype": {kind(place) for place in receptacles} | set(STATIONS.values()),
             "otype": {kind(thing) for thing in places} | {"knife", "butterknife"}}
    typed = ["agent1 - agent", "loc_bar_0 - location", *(f"{place} - location" for place in at.values())]
    typed += [f"{camel.get(name, name)}Type - {group}" for group, names in kinds.items() for name in sorted(names)]
    typed += [f"{ids[place]} - receptacle" for place in receptacles] + [f"{ids[thing]} - object" for thing in places]
    holds = household()["holds"]
    contain = [f"canContain {camel[r]}Type {camel[o]}Type" for r in sorted(kinds["rtype"])
               for o in holds[r] if o in kinds["otype"]]
    return typed, contain


def pddl_problem(task, goals):
    """A room as a PDDL problem for ALFWorld's domain; `goals` is the package's goal library."""
    tables, (receptacles, places) = household(), room_of(task)
    ids, camel = pddl_ids([*receptacles, *places]), tables["camel"]
    at = {place: f"loc_bar_{number}" for number, place in enumerate(receptacles, 1)}
    typed, init = pddl_objects(task, ids, at)
    init += ["atLocation agent1 loc_bar_0", "= (total-cost) 0"]
    for place in receptacles:
        init += [f"receptacleType {ids[place]} {camel[kind(place)]}Type",
                 f"receptacleAtLocation {ids[place]} {at[place]}"]
        init += [f"openable {ids[place]}"] if kind(place) in tables["openable"] else []
    for thing, place in places.items():
        init += [f"objectType {ids[thing]} {camel[kind(thing)]}Type", f"inReceptacle {ids[thing]} {ids[place]}",
                 f"objectAtLocation {ids[thing]} {at[place]}"]
        traits = [word for word in ("cleanable", "heatable", "coolable") if kind(thing) in tables[word]]
        traits += ["toggleable" if "lamp" in thing else "pickupable"]
        traits += ["isReceptacleObject"] if kind(thing) in tables["containers"] else []
        init += [f"{trait} {ids[thing]}" for trait in traits]
    names = {"obj": camel[task["object"]], "recep": camel[task["target"]], "toggle": camel[task["target"]]}
    goal = goals[task["type"]]["pddl"].format(**names).replace("#", "-")  # closes the problem, too
    objects, facts = "\n  ".join(typed), "\n  ".join(f"({fact})" for fact in init)
    return f"(define (problem room)\n (:domain alfred)\n (:objects\n  {objects}\n )\n (:init\n  {facts}\n )\n{goal}"


def write_game(task, directory):
    """Write a built-in task as a game of the real engine, in the layout of the official data; the game file's path."""
    if "type" not in (task if isinstance(task, dict) else {}) or "game" in task:
        raise UserError(f"only a task of the built-in ALFWorld can be written as a game, not {task!r}")
    alf, house, camel = import_alfworld(), House(task), household()["camel"]
    looks, target, thing = task["type"].startswith("look"), camel[task["target"]], camel[task["object"]]
    name = f"{task['type']}-{thing}-None-{target}-{task['seed']}"
    folder = pathlib.Path(directory) / name / f"trial_{task['seed']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    domain, grammar = (pathlib.Path(path).read_text(encoding="utf-8")
                       for path in (alf.info.ALFRED_PDDL_PATH, alf.info.ALFRED_TWL2_PATH))
    params = {"object_target": thing, "parent_target": "" if looks else target, "mrecep_target": "",
              "toggle_target": target if looks else "", "object_sliced": False}
    contents = {"traj_data.json": {"task_type": task["type"], "pddl_params": params, "task": task},
                "game.tw-pddl": {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL", house.sentence),
                                 "pddl_problem": pddl_problem(task, alf.goals), "solvable": True}}
    for file, data in contents.items():
        (folder / file).write_text(json.dumps(data), encoding="utf-8")
    return str(folder / "game.tw-pddl")


# ---------------------------------------------------------------------------------------------------------
# Making and playing

ENVS = {"taxi": DangerousTaxi, "alfworld": ALFWorld}


def make(name, **options):
    """An environment by its short name, or by `package.module:Class` for one of your own; options go to its constructor."""
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
    parser.add_argument("--env", default="taxi", help="taxi, alfworld, or package.module:Class (default: taxi)")
    parser.add_argument("--games", metavar="PATH", help="play these real ALFWorld games, with --env alfworld")
    parser.add_argument("--write-games", metavar="DIR", help="write ALFWorld's split as real game files, and stop")
    parser.add_argument("--split", default="train", choices=("train", "valid", "test"), help="split of the task (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="which task of the split, and the env's seed (default: 0)")
    args = parser.parse_args()
    env = make(args.env, **({"games": args.games} if args.games else {}))
    tasks = env.tasks(args.split)
    if args.write_games:
        for task in tasks:
            print(write_game(task, pathlib.Path(args.write_games) / args.split))
        return
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
