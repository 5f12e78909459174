"""Text environments: the contract, DangerousTaxi, AutoExplore, ALFWorld.

An agent reads a `state` (text), picks one of `info["actions"]` (a tuple of texts) by its index, and gets a
reward. The signature is Gymnasium's, without the dependency:

    state, info = env.reset(seed=0, options={"task": task})
    state, reward, terminated, truncated, info = env.step(action)

`terminated` means that the task itself ended (well or badly), `truncated` that the horizon was reached.
`info["success"]` is the environment's own verdict; nobody should infer it from the return.

DangerousTaxi is Gymnasium's Taxi-v3 in which any useless move is fatal, shown as a map of characters.

AutoExplore: walk through a directory tree to the file that answers a question. Deviations: the tree is
read into memory once, and nothing is executed or written; the state shows what has been seen here, not all history.

ALFWorld is played on a built-in engine that speaks its language on rooms drawn from a seed, or on the
real one. Deviation: the state is not the history but notes of it (see `ALFWorld`), so that it repeats and stays short.

    python envs.py --env taxi              # play it by hand; or autoexplore, alfworld
"""

import argparse
import collections
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import json
import keyword
import os
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

    Required: `reset`, `step`, `tasks`; for teacher data `expert_action` and `reflection(mistake)`, the teacher's line
    on the current state, `mistake` being whether the last move was not the expert's (those of this file have theirs in
    `negatives.py`); for the corpus of the base LM `describe`. `info` has `actions` (a tuple of texts) and `success`.
    A task is any JSON-serialisable value; options are the reset options of a curriculum stage, such as
    `{"mode": "pickup"}`. After a `reset` with the same seed and task everything is the same again, and the environment
    truncates itself at its horizon.
    """

    horizon = 30  # steps after which an episode is truncated
    settings = {}  # its own defaults of command-line options, such as {"trajectories": 1000}
    training = {}  # reset options of training episodes and teacher data (augmentation); evaluation has none
    rules = ()  # what is true of every state, in sentences; corpus of the base LM only

    @staticmethod
    def numbered():
        """Kinds of things that go by a number, such as `cabinet 3`: one token each to the base LM's tokenizer."""
        return ()

    @staticmethod
    def words():
        """Words that the base LM's tokenizer should know, one token each, though random play may never show them."""
        return ()

    def reset(self, *, seed=None, options=None):
        """Start an episode: `(state, info)`. `seed` reseeds the env's own RNG; `options["task"]` names the task."""
        raise NotImplementedError

    def step(self, action):
        """Take `info["actions"][action]`: `(state, reward, terminated, truncated, info)`."""
        raise NotImplementedError

    def tasks(self, split):
        """The fixed list of tasks of a split, `train`, `valid` or `test`; the three are disjoint, none is empty."""
        raise NotImplementedError

    def groups(self, task):
        """Names of the groups of tasks, such as `depth 2`, under which evaluation reports a task as well."""
        return ()

    def expert_action(self):
        """Index of an optimal action in the current state, whichever that is: mistakes lead off the way."""
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
        "The next goal of a trip: first the passenger, next the destination.",
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
        self.before = self.taxi_state  # what the last action started from
        self.milestone_due = self.mode == "full"
        return self.render(), self.info()

    def step(self, action):
        check_action(self, action, self.actions)
        self.before = before = self.taxi_state
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
        return [*facts, ("Blocked:", f" {', '.join(self.blocked()) or 'nothing'}."), *self.describe_last()]

    def describe_last(self):
        """What the last action was, where it began, and whether the taxi is now nearer to where it has to go."""
        (old_row, old_col, *_), (row, col, *_) = taxi_decode(self.before), taxi_decode(self.taxi_state)
        facts = [
            ("The last action was", f" {self.last}."),
            ("Before it the taxi was at row", f" {old_row} column {old_col}."),
        ]
        if (old_row, old_col) != (row, col):
            to_row, to_col = self.target()
            nearer = abs(row - to_row) + abs(col - to_col) < abs(old_row - to_row) + abs(old_col - to_col)
            facts.append((f"To {self.last} led", f" {'towards' if nearer else 'away from'} the next goal."))
        return facts

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
# AutoExplore: trees. A tree is nested dicts, name -> dict (a directory) or str (the text of a file).

DATA = pathlib.Path(__file__).resolve().parent / "data"
HEAD_BYTES = 16 * 1024  # of a file, what is read
MAX_DEPTH, MAX_FILES = 40, 100_000
NOTES = ("[empty file]", "[binary file]", "[unreadable file]")  # what `cat` shows where there is no text
CUT = "[cut]"


@functools.cache
def read_tree(root):
    """A directory of the disk as a tree, read once per process; nothing is ever written and no link followed.

    Hidden entries, `__pycache__`, symbolic links and special files (pipes, devices) are left out.
    """
    if not os.path.isdir(root):
        raise UserError(f"{str(root)!r} is not a directory")
    return read_directory(root, MAX_DEPTH, itertools.count(1))


def read_directory(path, depth, counter):
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # unreadable: an empty directory
        return {}
    tree = {}
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir(follow_symlinks=False):
            tree[entry.name] = read_directory(entry.path, depth - 1, counter) if depth else {}
        elif entry.is_file(follow_symlinks=False):
            tree[entry.name] = read_head(entry.path)
            if next(counter) > MAX_FILES:
                raise UserError(f"more than {MAX_FILES} files: choose a smaller directory ({path!r})")
    return tree


def read_head(path):
    """The first `HEAD_BYTES` of a file as text; a note of `NOTES` where there is none to show."""
    # O_NOFOLLOW and O_NONBLOCK: the entry may have become a link or a pipe since it was listed.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            head = file.read(HEAD_BYTES + 1)
    except OSError:
        return "[unreadable file]"
    if b"\0" in head:
        return "[binary file]"
    text = head[:HEAD_BYTES].decode("utf-8-sig", errors="replace")
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if line)
    return (text + "\n" + CUT if len(head) > HEAD_BYTES else text) or "[empty file]"


def tree_of(root):
    """The tree that a task's `root` names: `generated:SEED`, `reworded:SEED:NAME`, an absolute path, or a name under
    data/repos."""
    if root.startswith("generated:") and root[10:].isdecimal():
        return generate_tree(int(root[10:]))
    if re.fullmatch(r"reworded:\d+:[^/\\]+", root):
        _, seed, name = root.split(":", 2)
        return reworded_tree(int(seed), name)
    if os.path.isabs(root):
        return read_tree(root)
    if root in (".", "..") or "/" in root or "\\" in root or not (DATA / "repos" / root).is_dir():
        raise UserError(f"no repository {root!r}: give a name under data/repos, generated:SEED or an absolute path")
    return read_tree(str(DATA / "repos" / root))


def files_of(tree, path=()):
    """Every file of a tree: `(path as a tuple of names, text)`, sorted."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from files_of(tree[name], path + (name,))
        else:
            yield path + (name,), tree[name]


def show_name(name):
    """A name as the agent sees it, one line and unmistakable: odd ones are quoted, with escapes.

    `\\xNN` is a byte that is not UTF-8, `\\u` a character that does not print.
    """
    if name.isprintable() and not set(name) & set(" \"'\\") and not name.startswith("-"):
        return name
    special = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}

    def escape(c):
        if "\udc80" <= c <= "\udcff":  # how Python decodes such a byte in a file name
            return f"\\x{ord(c) - 0xDC00:02x}"
        return special.get(c) or (c if c.isprintable() else f"\\u{ord(c):06x}")

    return '"' + "".join(map(escape, name)) + '"'


def count_tokens(text):
    """About what a small byte-level tokenizer makes of a text: every digit, mark and new line counts."""
    return len(re.findall(r"[A-Za-z]{1,8}|\n|[^A-Za-z\s]", text))


def cut_text(text, max_lines=8, max_tokens=60, count=count_tokens):
    """The beginning of a text, with a mark when something is left out; the mark is not part of the budget."""
    kept = "\n".join(text.split("\n", max_lines)[:max_lines])
    low, high = 0, min(len(kept), 16 * max_tokens)  # a token has hardly ever more characters
    if high < len(kept) or count(kept) > max_tokens:
        while low < high:  # the longest prefix within the budget, by bisection
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(kept[:middle]) <= max_tokens else (low, middle - 1)
        kept = kept[:low]
    return kept if len(kept) == len(text) else kept.rstrip() + "\n" + CUT


# AutoExplore: words, questions and tasks. Here and not in negatives.py, since the task set is part of the
# environment: `--repos DIR` has to work wherever an environment is made.

STOP = frozenset(
    re.findall(
        r"\w+",
        """
    a about after all also among an and any are as at be been before but by can code defines described do does each
    every explains file for from gives had has have how if in into is it its just kept may more most must never no
    not of off on one only or other our out over per read say says set sets settings should so some than that the
    their them then there these they this those through to too two under up use used uses was were what when where
    which while who will with without you your table""",
    )
)


def spelt_words_of(text):
    """The words of a text that carry meaning, as spelt and in order; `snake_case` and `camelCase` are split."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.findall(r"[^\W\d_]{3,}", text) if word.lower() not in STOP]


def words_of(text):
    """The same in lower case: what is compared."""
    return [word.lower() for word in spelt_words_of(text)]


@functools.lru_cache(maxsize=100_000)
def stem(word):
    """What words of one family share: roast of `roasts`, `roasted`, `roaster`, `roasting`."""
    word = re.sub(r"(?<=...)(ings?|ers?|ies|y|ed|es|s|e)$", "", word)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word  # shipp(ing) is ship


def stems_of(text):
    return {stem(word) for word in set(words_of(text))}


CODE = ("py", "pyi", "js", "ts", "sh", "c", "h", "cpp", "go", "rs", "java", "rb", "sql")
COMMENT = re.compile(r"\s*(?:#+|//+|--|/?\*+|[rR]?\"\"\"|''')\s*(\w.*)")
DEFINITION = re.compile(r"\s*(?:async |export |public |static )*(?:def|class|function|func?|fn)\s+(\w+)")


def shown_text(name, text):
    """What `cat` shows before it is cut to its budget. Long code begins with a licence and imports, so of that it is an
    outline: comments, first lines of docstrings, and what is defined."""
    if name.rpartition(".")[2].lower() not in CODE:
        return text
    header = re.match(r"(?:[ \t]*(?:#|//|/?\*).*\n)+", text)
    if header and re.search("copyright|licen[sc]e", header[0], re.IGNORECASE):
        text = text[header.end() :]
    if text.count("\n") < 15:
        return text
    text = re.sub(r"(?m)^([ \t]*[rR]?\"\"\")\n\s*(?=[A-Z])", r"\1", text)  # docstrings that begin on their second line
    outline = [DEFINITION.match(line) or COMMENT.match(line) for line in text.split("\n")]
    return "\n".join(line[0].strip() for line in outline if line) or text


def facts_of(name, text):
    """What a question can be asked about: `(noun, verb, phrase)`, from the part of a file that `cat` shows."""
    suffix = name.rpartition(".")[2].lower()
    if text.endswith(CUT):  # the last line may have been cut within
        text = "\n".join(text.split("\n")[:-2])
    if not text or text.startswith(NOTES):
        return []
    if suffix in ("csv", "tsv"):
        return table_facts(text, "," if suffix == "csv" else "\t")
    if suffix in ("json", "yaml", "yml", "toml", "ini", "cfg"):
        return key_facts(text)
    if suffix in CODE:
        return code_facts(text)
    return prose_facts(text)


def sentences(text):
    """Short sentences, without the final mark and with a small first letter."""
    found = [part.strip(" \"'*#/-") for part in re.split(r"(?<=[.!?:])\s", text)]
    found = [part.rstrip(".!?:\"'* ") for part in found if part[:1].isalpha()]
    return [part[0].lower() + part[1:] if part[1:2].islower() else part for part in found]


def prose_facts(text):
    facts = []
    for line in text.split("\n"):
        if line.startswith("#"):
            facts += [("file", "explains", phrase) for phrase in sentences(line.lstrip("# "))]
        else:
            facts += [("file", "says:", phrase) for phrase in sentences(line)]
    return facts


def code_facts(text):
    facts = []
    for line in text.split("\n"):
        comment, definition = COMMENT.match(line), DEFINITION.match(line)
        if comment:
            facts += [("code", "says:", phrase) for phrase in sentences(comment[1].split('"""')[0])]
        if definition:
            facts.append(("code", "defines", " ".join(words_of(definition[1]))))
    return facts


def table_facts(text, comma):
    rows = [[cell.strip() for cell in line.split(comma)] for line in text.split("\n")]
    columns = [" ".join(words_of(cell)) for cell in rows[0]]
    phrases = [" and ".join(pair) for pair in itertools.combinations(filter(None, columns[1:]), 2)]
    for row in rows[1:]:
        phrases += [f"{column} of {row[0]}" for column in columns[1:] if column and words_of(row[0])]
    return [("table", "gives the", phrase) for phrase in phrases]


def key_facts(text):
    facts, parents = [], {}
    for line in text.split("\n"):
        entry = re.match(r"(\s*)[-\[]?\s*\"?([A-Za-z_][\w .-]*?)\"?\s*(?:[:=]\s*(.*)|\]$)", line)
        if line.lstrip().startswith("#"):
            facts += [("settings file", "says:", phrase) for phrase in sentences(line.strip("# "))]
        elif entry:
            indent, key = len(entry[1]), " ".join(words_of(entry[2]))
            outer = " ".join(parents[i] for i in sorted(parents) if i < indent)
            parents = {i: name for i, name in parents.items() if i < indent} | {indent: key}
            value = " ".join(re.findall(r"[^\W\d_]+", entry[3] or ""))
            phrase = f"{key} of {outer}" if outer else f"{key} to {value}" if value else key
            facts.append(("settings file", "sets the", phrase))
    return facts


def question_of(fact, hint):
    """A question for a fact; the words of the directories in `hint` tell where to look."""
    noun, verb, phrase = fact
    about = " and ".join(dict.fromkeys(word for name in hint for word in words_of(name)))
    return f"Which {noun} {'about ' + about + ' ' if about else ''}{verb} {phrase}?"


def quotes_name(question, name):
    """Whether a question gives away a file's name: the name, or the words of its stem in a row."""
    spoken = " ".join(re.findall(r"[^\W\d_]+", question.lower()))
    words = " ".join(re.findall(r"[^\W\d_]+", name.rpartition(".")[0].lower() or name.lower()))
    return name.lower() in question.lower() or bool(words) and f" {words} " in f" {spoken} "


def tasks_of_tree(tree, root, rng, per_file=2, most=400, hint=0.9):
    """Reverse question generation: tasks whose questions one file of the tree answers, at most `per_file` each.

    A question is refused when another file answers it too, or when it quotes the file's name. A directory on the way
    whose name the question does not touch is mentioned in it with probability `hint`.
    """
    texts = dict(files_of(tree))
    holders = collections.defaultdict(set)  # stem -> the files that have it
    for path, text in texts.items():
        for word in stems_of(" ".join([text, *path[:-1]])):
            holders[word].add(path)
    tasks, pages = [], page_numbers(tree)
    for path in rng.sample(sorted(texts), len(texts)):
        route, seen = optimal_path(path, pages), cut_text(shown_text(path[-1], texts[path]))
        facts = list(dict.fromkeys(facts_of(path[-1], seen))) if len(route) <= 10 else []  # in order, none twice
        rng.shuffle(facts)
        unique = (fact for fact in facts if is_unique(fact[2], path, holders, texts))
        for fact in itertools.islice(unique, per_file):
            missing = [name for name in path[:-1] if not stems_of(name) & stems_of(fact[2]) and rng.random() < hint]
            question = question_of(fact, missing)
            if not quotes_name(question, path[-1]):
                tasks.append(
                    {
                        "question": question,
                        "targets": ["/".join(path)],
                        "root": root,
                        "depth": len(path) - 1,
                        "path": route,
                    }
                )
        if len(tasks) >= most:
            break
    return tasks


def is_unique(phrase, path, holders, texts):
    """Whether a phrase has two to seven words of meaning, and no other file has them all where one would look: in the
    names of its directories together with a single line, or with what `cat` shows of it."""
    stems = stems_of(phrase)
    if not 2 <= len(stems) <= 7 or len(phrase) > 90 or "|" in phrase:
        return False
    others = set.intersection(*(holders[word] for word in stems)) - {path}
    if len(others) > 5:  # common words: a poor question, and too many files to look through
        return False
    parts = ((p, part) for p in others for part in (cut_text(shown_text(p[-1], texts[p])), *texts[p].split("\n")))
    return not any(stems <= stems_of(" ".join([part, *p[:-1]])) for p, part in parts)


def optimal_path(path, pages):
    """The action texts of a shortest way to a file, at the default page size: down, read, identify."""
    moves = []
    for i, name in enumerate(path):
        verb = "cd" if i < len(path) - 1 else "cat"
        moves += ["more"] * pages[path[: i + 1]] + [f"{verb} {show_name(name)}"]
    return moves + [f"id {show_name(path[-1])}"]


def page_numbers(tree, path=()):
    """`{path: page}` of everything in a tree: on which page of its directory it is listed."""
    numbers = {path + (name,): page for page, names in enumerate(pages_of(tree, path)) for name in names}
    for name, node in tree.items():
        if isinstance(node, dict):
            numbers |= page_numbers(node, path + (name,))
    return numbers


PAGE_ACTIONS, PAGE_CHARS = 26, 160  # of a listing: moves in its menu, characters of names


def pages_of(directory, cwd, hidden=frozenset(), max_actions=PAGE_ACTIONS, max_chars=PAGE_CHARS):
    """The names of a directory, subdirectories first, in pages that leave room for `cd ..` and `more` in the menu.

    A page has at most `max_chars` characters of names (but one name in any case): a prompt has each up to five times
    (listing, seen, reflection, `cat`, `id`), and has to fit the context.
    """
    pages, room, chars = [[]], max_actions - 2, max_chars
    for name in sorted(directory, key=lambda name: (not isinstance(directory[name], dict), name)):
        if cwd + (name,) not in hidden:
            cost = 1 if isinstance(directory[name], dict) else 2  # `cd`; `cat` and `id`
            length = len(show_name(name))
            if cost > room or pages[-1] and length > chars:
                pages.append([])
                room, chars = max_actions - 2, max_chars
            pages[-1].append(name)
            room, chars = room - cost, chars - length
    return pages


def read_tasks(path):
    """Tasks from JSON lines; a bad line is named by its number."""
    tasks = []
    try:
        lines = open(path, encoding="utf-8").read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read tasks from {str(path)!r}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                tasks.append(checked_task(json.loads(line)))
        except (ValueError, UserError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return tasks


def checked_task(task):
    """The task itself, when it has what an episode needs."""
    if not isinstance(task, dict):
        raise UserError(f"a task of AutoExplore is a dict, not {task!r}")
    for key, kind in (("question", str), ("targets", list), ("root", str)):
        if not isinstance(task.get(key), kind) or not task[key]:
            raise UserError(f"a task of AutoExplore needs a non-empty {kind.__name__} {key!r}: {task!r}")
    for target in task["targets"]:
        node = tree_of(task["root"])
        for name in target.split("/") if isinstance(target, str) else [""]:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, str):
            raise UserError(f"target {target!r} is not a file of {task['root']!r}")
    return task


INVENTED = 1000  # generated repositories from this seed on speak of things that nobody has heard of


def split_of_seed(seed):
    """Generated repositories are split 7:2:1 by seed, each with themes of its own; invented ones are for training."""
    return "train" if seed % 10 < 7 or seed >= INVENTED else "valid" if seed % 10 < 9 else "test"


def split_repositories(roots):
    """`{split: roots}`, 7:2:1, by a fixed shuffle; few repositories leave `valid`, then `test` empty."""
    roots = sorted(roots)
    random.Random(0).shuffle(roots)
    tests, valids = (len(roots) + 8) // 10 or int(len(roots) > 1), len(roots) // 5
    return {"test": roots[:tests], "valid": roots[tests : tests + valids], "train": roots[tests + valids :]}


@functools.lru_cache(maxsize=8)
def explore_tasks(repos, generated, per_file):
    """`{split: tasks}`; the questions of train repositories are split again into `train`, `valid_seen`, `test_seen`."""
    splits = split_repositories(repositories(repos))
    for seed in () if repos else [*range(generated), *range(INVENTED, INVENTED + generated)]:
        splits[split_of_seed(seed)].append(f"generated:{seed}")
    tasks = {"train": [], "valid_seen": [], "test_seen": [], "valid": [], "test": []}
    for split, roots in splits.items():
        for root in roots:
            rng = random.Random(os.path.basename(root))
            found = tasks_of_tree(tree_of(root), root, rng, 1 if root.startswith("generated:") else per_file)
            if split != "train":
                tasks[split] += found
                continue
            rng.shuffle(found)
            first, second = len(found) * 7 // 10, len(found) * 9 // 10
            tasks["train"] += found[:first]
            tasks["valid_seen"] += found[first:second]
            tasks["test_seen"] += found[second:]
    if not tasks["train"]:
        raise UserError(f"no question could be made from the files of {repos!r}: too few text files")
    for split in ("valid", "test"):  # too few repositories to keep one apart: unseen questions must do
        tasks[split] = tasks[split] or tasks[split + "_seen"]
    return tasks


def repositories(repos):
    """Roots: those of data/repos, or `repos` itself when it holds files, else its subdirectories."""
    if repos is None:
        return sorted(path.name for path in (DATA / "repos").iterdir() if path.is_dir())
    repos = os.path.abspath(repos)
    tree = read_tree(repos)
    inside = [name for name in tree if isinstance(tree[name], dict) and any(files_of(tree[name]))]
    if not inside or len(inside) < len(tree):
        return [repos]
    return [os.path.join(repos, name) for name in inside]


# AutoExplore: generated repositories.


@functools.lru_cache(maxsize=1)
def vocabulary():
    return json.loads((DATA / "themes.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1024)
def generate_tree(seed):
    """A made-up repository: departments, in them areas with files, and files of their own; the same for one seed.

    Themes (departments and the things they deal with) come from the split of the seed; aspects (`price`, `owner`)
    are everybody's, so that files of different departments have words in common. From seed `INVENTED` on all words are
    invented: there one can only compare them, which is what unseen repositories ask for.
    """
    rng = random.Random(f"tree {seed}")
    words = vocabulary() | {"themes": vocabulary()["themes"][split_of_seed(seed)]}
    if seed >= INVENTED:
        words = {key: part if key == "kinds" else invented(part, rng) for key, part in words.items()}
    themes = words["themes"]
    departments = {}
    for theme in rng.sample(sorted(themes), 2):
        for department in rng.sample(sorted(themes[theme]), rng.choice((1, 2, 2))):
            departments[department] = themes[theme][department]
    tree = {"README.md": generated_readme(departments)}
    for department, things in departments.items():
        things = rng.sample(things, len(things))
        tree[department] = generated_files(rng, words, department, things[0], rng.choice((2, 3)))
        for thing in things[1 : rng.choice((2, 3, 4))]:
            tree[department][thing] = generated_files(rng, words, department, thing, rng.choice((2, 3, 4)))
            if rng.random() < 0.3:
                place = rng.choice(words["places"])
                tree[department][thing][place] = generated_files(rng, words, department, thing, 2, place)
    return tree | generated_files(rng, words, "company", rng.choice(words["company"]), 2)


@functools.lru_cache(maxsize=1)
def common_words():
    """2,710 words: common English nouns, and what is frequent in the docstrings of Python's standard library."""
    return (DATA / "words.txt").read_text(encoding="utf-8").split()


@functools.lru_cache(maxsize=1)
def held_out_words():
    """The words of the themes of `valid` and `test`."""
    themes = vocabulary()["themes"]
    return set(re.findall("[a-z]+", json.dumps([themes["valid"], themes["test"]]).lower()))


def invented(words, rng):
    """Words in lists and dictionaries, each replaced by another: an English one, or one that does not exist, such as
    `galling`, of gallery and rolling. Words of `valid` and `test` never come up."""
    if isinstance(words, dict):
        return {invented(key, rng): invented(value, rng) for key, value in words.items()}
    if isinstance(words, list):
        return [invented(word, rng) for word in words]
    word = words
    while word == words or word in held_out_words():
        first, last = rng.sample(common_words(), 2)
        word = first if rng.random() < 0.5 else first[: len(first) // 2 + 1] + last[len(last) // 2 :]
    return word


# words that stay in a reworded repository: without them code is no code, and a file not of its kind
KEPT = {
    *map(str.lower, keyword.kwlist),
    *CODE,
    *["csv", "html", "json", "license", "readme", "toml", "txt", "yaml", "yml"],
}


@functools.lru_cache(maxsize=256)
def reworded_tree(seed, name):
    """A repository of data/repos in other words: each word of meaning becomes an invented one, in names and in texts.

    Words of one family stay one: where `roast` becomes `gallery`, `roasting` becomes `galling`. So there are as many
    repositories as one likes that are laid out and phrased as people do it, and none that can be learned by heart.
    An unknown name is a `UserError`.
    """
    rng, others = random.Random(f"reworded {seed} {name}"), {}

    def other(match):
        word = match[0].lower()
        if word in STOP or word in KEPT:
            return match[0]
        root = stem(word)
        if root not in others:
            others[root] = invented(word, rng)
        new = stem(others[root]) + word[len(root) :] if word[len(root) :] else others[root]
        return new.upper() if match[0].isupper() else new.capitalize() if match[0][0].isupper() else new

    def reworded(text):
        return re.sub(r"[A-Z][a-z]{2,}|[a-z]{3,}|[A-Z]{3,}", other, text)

    def rewritten(tree):
        names = {entry: reworded(entry) for entry in tree}
        clash = len(set(names.values())) < len(names)  # two names became one: better the old than a file lost
        return {
            entry if clash else names[entry]: rewritten(node) if isinstance(node, dict) else reworded(node)
            for entry, node in tree.items()
        }

    return rewritten(tree_of(name))


def generated_readme(departments):
    """A table of contents, in a form that no question is made of."""
    return "\n".join(["# Contents", *(" | ".join([name, *things[:3]]) for name, things in departments.items())])


def generated_files(rng, words, department, thing, count, place=None):
    """Files about one thing, each on an aspect of its own; half of them have a name that tells something."""
    files = {}
    for aspect in rng.sample(sorted(words["aspects"]), count):
        kind = rng.choice(sorted(words["kinds"]))
        related = rng.sample(words["aspects"][aspect], 2)
        slots = {
            "department": department,
            "thing": thing,
            "aspect": aspect,
            "other": related[0],
            "number": rng.randint(2, 90),
            "place": place or rng.choice(words["places"]),
        }
        slots |= {slot: rng.choice(words[slot + "s"]) for slot in ("person", "verb", "adjective")}
        name = rng.choice((related[1], rng.choice(words["names"])))
        files[f"{name}.{kind}"] = "\n".join(rng.choice(words["kinds"][kind])).format(**slots)
    return files


class AutoExplore(Env):
    """Find the file of a directory tree that answers a question.

    A task is a dict: `question`, `targets` (paths with `/`), `root` (see `tree_of`), and for the curriculum and the
    reader `depth` (0: a file of the root directory) and `path` (optimal action texts). Identifying a file ends the
    episode: right +1, wrong -0.5; every step costs 0.02. Deviation: the paper's agent sees the history of its commands;
    ours sees what it has seen of the directory it is in, so that equal situations are equal texts.

    `repos`: a directory of yours instead of data/repos; `questions`: a JSONL file of tasks instead of generated ones;
    `max_actions`, `max_chars`: the size of a page of a listing; `per_file`: most questions a file (of the `generated`
    repositories' files, which are many, one each).
    Reset options: `task`, `shuffle` (the menu in random order), `leave_out` (probability that a file that is not a
    target is hidden).
    """

    horizon = 15
    settings = {
        "labels": "words",
        "trajectories": 2000,
        "negatives": 0.75,
        "reflect_steps": 1000,
        "policy_steps": 500,
        "updates": 40,
        "eval_every": 40,
        "rl_lr": 2e-3,
        "max_reflection": 160,
    }
    training = {"shuffle": True, "leave_out": 0.2}
    turns = 2  # of the base LM's corpus: to find words again is the hardest to learn

    def __init__(
        self,
        repos=None,
        questions=None,
        horizon=15,
        count_tokens=count_tokens,
        result_tokens=60,
        result_lines=8,
        max_actions=PAGE_ACTIONS,
        max_chars=PAGE_CHARS,
        generated=100,
        per_file=8,
        shuffle=False,
        leave_out=0.0,
    ):
        if max_actions < 4:
            raise UserError(f"AutoExplore needs room for at least 4 actions in the menu, not {max_actions}")
        self.repos, self.questions, self.horizon = repos, questions, horizon
        self.cut = functools.partial(cut_text, max_lines=result_lines, max_tokens=result_tokens, count=count_tokens)
        self.page_size, self.generated, self.per_file = (max_actions, max_chars), generated, per_file
        self.defaults = {"shuffle": shuffle, "leave_out": leave_out}
        self.rng = random.Random()
        self.done = True

    words = staticmethod(common_words)

    def tasks(self, split):
        """`train`, `valid`, `test` (unseen repositories); `*_seen`: new questions on those of train."""
        names = ("train", "valid", "test", "valid_seen", "test_seen")
        if split not in names:
            raise UserError(f"unknown split {split!r}: one of {', '.join(names)}")
        if not self.questions:
            return list(explore_tasks(self.repos, self.generated, self.per_file)[split])
        tasks = read_tasks(self.questions)
        random.Random(0).shuffle(tasks)
        first, second = len(tasks) * 7 // 10, len(tasks) * 9 // 10
        parts = {"train": tasks[:first], "valid": tasks[first:second], "test": tasks[second:]}
        return parts[split.removesuffix("_seen")]

    def groups(self, task):
        root = task["root"]
        origin = "generated" if root.startswith("generated:") else "your own" if os.path.isabs(root) else "written"
        return *((f"depth {task['depth']}",) if "depth" in task else ()), f"{origin} repository"

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = random.Random(seed)
        options = self.defaults | (options or {})
        self.ask(checked_task(task_of(self, options)))
        self.tree = tree_of(self.task["root"])
        self.shuffle = options["shuffle"]
        self.hidden = (
            frozenset(
                path
                for path, _ in files_of(self.tree)
                if path not in self.targets and self.rng.random() < options["leave_out"]
            )
            if options["leave_out"]
            else frozenset()
        )
        self.seen = set()  # paths of the files read and the directories entered
        self.steps, self.done, self.success, self.last, self.result = 0, False, False, ("start", ""), ""
        self.enter(())
        return self.render(), self.info()

    def ask(self, task):
        """Make a task the present one; its repository is `reset`'s concern."""
        self.task, self.question = task, " ".join(task["question"].split())
        self.targets = {tuple(target.split("/")) for target in task["targets"]}

    def enter(self, cwd):
        self.cwd, self.page = cwd, 0
        self.directory = functools.reduce(dict.__getitem__, cwd, self.tree)
        self.pages = pages_of(self.directory, cwd, self.hidden, *self.page_size)
        self.list_moves()

    def list_moves(self):
        """The valid moves as `(verb, name)`: those of this page, `cd ..` below the root, `more` if there are pages."""
        self.moves = [("cd", "..")] if self.cwd else []
        for name in self.pages[self.page]:
            if isinstance(self.directory[name], dict):
                self.moves.append(("cd", name))
            else:
                self.moves += [("cat", name)] * (self.cwd + (name,) not in self.seen) + [("id", name)]
        self.moves += [("more", "")] * (len(self.pages) > 1)
        if self.shuffle:
            self.rng.shuffle(self.moves)
        self.actions = tuple(f"{verb} {show_name(name)}" if name else verb for verb, name in self.moves)

    def step(self, action):
        check_action(self, action, self.actions)
        verb, name = self.last = self.moves[action]
        self.steps, self.result = self.steps + 1, ""
        if verb == "cd":
            self.enter(self.cwd[:-1] if name == ".." else self.cwd + (name,))
            self.seen.add(self.cwd)
        elif verb == "cat":
            self.seen.add(self.cwd + (name,))
            self.result = self.cut(shown_text(name, self.directory[name]))
        elif verb == "more":
            self.page = (self.page + 1) % len(self.pages)
        else:
            self.success = self.cwd + (name,) in self.targets
            self.result = "right" if self.success else "wrong"
        self.list_moves()
        terminated = verb == "id"
        truncated = not terminated and self.steps >= self.horizon
        self.done = terminated or truncated
        reward = (1.0 if self.success else -0.5 if terminated else 0.0) - 0.02
        return self.render(), reward, terminated, truncated, self.info()

    def info(self):
        return {"actions": self.actions, "success": self.success}

    def shown(self, name):
        return show_name(name) + "/" * isinstance(self.directory[name], dict)

    def names_here(self):
        """The names on this page as shown, and those of them that have been read or visited."""
        names = self.pages[self.page]
        seen = [name for name in names if self.cwd + (name,) in self.seen]
        return [self.shown(name) for name in names], [self.shown(name) for name in seen]

    def render(self):
        here, seen = self.names_here()
        page = f" (page {self.page + 1} of {len(self.pages)})" if len(self.pages) > 1 else ""
        verb, name = self.last
        return "\n".join(
            [
                f"Question: {self.question}",
                f"Directory: /{'/'.join(map(show_name, self.cwd))}",
                f"Here: {' '.join(here) or 'nothing'}{page}",
                f"Seen: {' '.join(seen) or 'nothing'}",
                f"Last: {verb} {show_name(name)}".rstrip() if name else f"Last: {verb}",
            ]
            + [self.result] * bool(self.result)
        )

    def expert_action(self):
        """One step of a shortest way to the nearest target: there, read it unless that was done, and identify it."""

        def away(target):
            shared = len(os.path.commonprefix([self.cwd, target[:-1]]))
            return len(self.cwd) + len(target) - 2 * shared, target

        target = min(self.targets, key=away)
        if target[: len(self.cwd)] != self.cwd:
            move = ("cd", "..")
        elif len(target) > len(self.cwd) + 1:
            move = ("cd", target[len(self.cwd)])
        else:
            move = ("id" if target in self.seen else "cat", target[-1])
        return self.moves.index(move if move in self.moves else ("more", ""))

    def mistakes(self):
        """Indices of the actions that are not the expert's and do not end the episode: what a perturbation may take.

        None once the answer has been read: a state shows only the file read last, so that a later one could not say
        which of the files read before was the right one, and no reflection could be learned from it. Where the answer
        is to be read, other files are: they have some words of the question, but not all.
        """
        if self.seen & self.targets:
            return []
        expert = self.expert_action()
        wrong = [i for i, (verb, _) in enumerate(self.moves) if i != expert and verb != "id"]
        near_misses = [i for i in wrong if self.moves[i][0] == "cat" == self.moves[expert][0]]
        return near_misses or wrong

    def matches(self, text):
        """The words of the question that a text has too, in the question's order and spelling."""
        stems = stems_of(text)
        return [word for word in self.asked() if stem(word.lower()) in stems]

    def asked(self):
        """The words of the question, as they are spelt there."""
        return list(dict.fromkeys(spelt_words_of(self.question)))

    def describe(self):
        here, seen = self.names_here()
        words = self.asked()
        facts = [("The question has the words", f" {', '.join(words)}.")]
        if self.last[0] == "cat":
            facts += self.describe_result(show_name(self.last[1]), words)
        way = [f"{show_name(name)}/" for name in self.cwd]
        for place, names in (("On the way", way), ("The name", here)):
            facts += [(f"{place} {name} has", f" {', '.join(self.matches(name)) or 'no word'}.") for name in names]
        unread = [name for name in here if name not in seen]
        facts.append(("Seen here:", f" {', '.join(seen) or 'nothing'}."))
        facts.append(("Not seen yet:", f" {', '.join(unread) or 'nothing'}."))
        return facts

    def describe_result(self, name, words):
        """What the file just read talks about, and which words of the question it and its path have or lack."""
        topic = ", ".join(list(dict.fromkeys(words_of(self.result)))[:4])
        in_file, in_path = self.matches(self.result), self.matches(" ".join(self.cwd))
        places = ("the file" if word in in_file else "the path" if word in in_path else "neither" for word in words)
        verdicts = [(f"{word} is in", f" {place}.") for word, place in zip(words, places, strict=True)]
        return [(f"The file {name} speaks of", f" {topic or 'nothing'}."), *verdicts]

    def training_task(self, rng):
        """A task for corpus or teacher data: mostly of a repository that comes up only once, generated or reworded,
        since words that are met again and again are learned by heart, not compared."""
        share = rng.random()
        if self.repos or self.questions or share < 0.3:
            return rng.choice(self.tasks("train"))
        root = f"generated:{rng.randrange(10 * INVENTED, 10**9)}"
        if share < 0.6:
            root = f"reworded:{rng.randrange(10**9)}:{rng.choice(split_repositories(repositories(None))['train'])}"
        return rng.choice(tasks_of_tree(tree_of(root), root, rng, 1))

    def ask_here(self, rng):
        """Replace the question, for the base LM's corpus: by a training question that is answered near by, or by random
        words of what is seen here and of a file elsewhere. Else random play would nearly always be far from what it
        was asked about, and "no word", "neither" would be right without reading. Half of the time a file is read first:
        to find words in a text is harder than to find them in names, and comes up less often."""
        files = [i for i, (verb, _) in enumerate(self.moves) if verb == "cat"]
        if files and self.steps + 1 < self.horizon and rng.random() < 0.5:
            self.step(rng.choice(files))
        place = [*self.cwd, self.last[1]] if self.last[0] == "cat" and rng.random() < 0.5 else self.cwd
        beginning = "".join(f"{name}/" for name in place)
        here = (task for task in self.tasks("train") if task["root"] == self.task["root"])
        near = [task for task in here if f"{task['targets'][0]}/".startswith(beginning)]
        if near and rng.random() < 0.5:
            return self.ask(rng.choice(near))
        texts = [" ".join(self.names_here()[0]), " ".join(self.cwd), self.result]
        pools = [words for words in map(spelt_words_of, texts) if words]
        pools.append(spelt_words_of(rng.choice([text for _, text in files_of(self.tree)])) or ["nothing"])
        words = list(dict.fromkeys(rng.choice(rng.choice(pools)) for _ in range(rng.randint(3, 8))))
        self.ask(self.task | {"question": f"Which file about {words[0]} says: {' '.join(words[1:])}?"})


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
            found += [
                (room, thing, target)
                for target in targets
                if target in lamps or (thing in tables["holds"][target] and target != STATIONS.get(verb))
            ]
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
            free = [
                r
                for r in receptacles
                if kind(r) in homes[thing]
                and list(places.values()).count(r) < 4
                and not (thing == task["object"] and kind(r) == task["target"])
            ]
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
        return (
            "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
            f"you see {listing(self.receptacles)}.\n\nYour task is to: {self.sentence}."
        )

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
                found |= {
                    f"{verb} {hand} with {here}"
                    for verb, station in STATIONS.items()
                    if kind(here) == station and kind(hand) in tables[verb + "able"]
                }
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
        done = [
            place
            for thing, place in self.places.items()
            if kind(thing) == goal["object"]
            and kind(place) == goal["target"]
            and (trait is None or trait in self.traits[thing])
        ]
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
        return {
            thing: place
            for place in self.receptacles
            for thing in in_order(self.contents.get(place, ()))
            if kind(thing) == name
        }

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

    settings = {
        "labels": "words",
        "trajectories": 1000,
        "reflect_steps": 1500,
        "policy_steps": 200,
        "updates": 25,
        "rl_lr": 2e-3,
        "eval_every": 25,
    }
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
            raise UserError(
                f"no game of split {split!r} in the games directory: there are "
                + ", ".join(f"{len(found)} of split {name}" for name, found in self.games.items())
            )
        return list(self.games[split])

    @staticmethod
    def numbered():
        rooms = household()
        return sorted({name for table in ("rooms", "homes") for room in rooms[table].values() for name in room})

    def groups(self, task):
        """The type, and whether training had this combination of object and target (known for built-in rooms)."""
        known = [f"{task['combination']} combination"] if "combination" in task else []
        return (task["type"].replace("_", " "), *known)

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
        return "\n".join(
            [
                f"Your task is to: {notes.sentence}.",
                f"Not searched: {', '.join(notes.unsearched()) or 'nothing'}.",
                f"Searched: {', '.join(place for place in notes.receptacles if place in notes.contents) or 'nothing'}.",
                f"Seen: {', '.join(seen) or 'nothing'}.",
                f"In hand: {held}.",
                f"You are at: {here or 'the middle of the room'}.",
                f"Last action: {notes.command}.",
                notes.observation,
            ]
        )

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
        facts = [
            f"You are at {notes.here or 'the middle of the room'}.",
            f"In hand is {notes.title(notes.hand) if notes.hand else 'nothing'}.",
            f"{len(notes.unsearched())} places are not searched.",
        ]
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
        facts += self.describe_goal() if goal else []
        return [re.fullmatch(r"(.*? (?:is|are|be|was))( .*)", fact).groups() for fact in facts]

    def describe_goal(self):
        """Sentences about the task: what it asks for, where such things are kept, what of it was seen."""
        notes, goal = self.notes, self.goal
        verb, lamp = treatment(goal["type"]), goal["type"].startswith("look")
        facts = [
            f"The task is about {'two' if 'two' in goal['type'] else 'a'} {goal['object']}.",
            f"The {'lamp is a' if lamp else 'target is the'} {goal['target']}.",
        ]
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
        unseen, seen = pool[:cut], pool[cut : cut + ALFWorld.counts["train"]]
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
    kinds = {
        "rtype": {kind(place) for place in receptacles} | set(STATIONS.values()),
        "otype": {kind(thing) for thing in places} | {"knife", "butterknife"},
    }
    typed = ["agent1 - agent", "loc_bar_0 - location", *(f"{place} - location" for place in at.values())]
    typed += [f"{camel.get(name, name)}Type - {group}" for group, names in kinds.items() for name in sorted(names)]
    typed += [f"{ids[place]} - receptacle" for place in receptacles] + [f"{ids[thing]} - object" for thing in places]
    holds = household()["holds"]
    contain = [
        f"canContain {camel[r]}Type {camel[o]}Type"
        for r in sorted(kinds["rtype"])
        for o in holds[r]
        if o in kinds["otype"]
    ]
    return typed, contain


def pddl_problem(task, goals):
    """A room as a PDDL problem for ALFWorld's domain; `goals` is the package's goal library."""
    tables, (receptacles, places) = household(), room_of(task)
    ids, camel = pddl_ids([*receptacles, *places]), tables["camel"]
    at = {place: f"loc_bar_{number}" for number, place in enumerate(receptacles, 1)}
    typed, init = pddl_objects(task, ids, at)
    init += ["atLocation agent1 loc_bar_0", "= (total-cost) 0"]
    for place in receptacles:
        init += [
            f"receptacleType {ids[place]} {camel[kind(place)]}Type",
            f"receptacleAtLocation {ids[place]} {at[place]}",
        ]
        init += [f"openable {ids[place]}"] if kind(place) in tables["openable"] else []
    for thing, place in places.items():
        init += [
            f"objectType {ids[thing]} {camel[kind(thing)]}Type",
            f"inReceptacle {ids[thing]} {ids[place]}",
            f"objectAtLocation {ids[thing]} {at[place]}",
        ]
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
    domain, grammar = (
        pathlib.Path(path).read_text(encoding="utf-8")
        for path in (alf.info.ALFRED_PDDL_PATH, alf.info.ALFRED_TWL2_PATH)
    )
    params = {
        "object_target": thing,
        "parent_target": "" if looks else target,
        "mrecep_target": "",
        "toggle_target": target if looks else "",
        "object_sliced": False,
    }
    contents = {
        "traj_data.json": {"task_type": task["type"], "pddl_params": params, "task": task},
        "game.tw-pddl": {
            "pddl_domain": domain,
            "grammar": grammar.replace("UNKNOWN GOAL", house.sentence),
            "pddl_problem": pddl_problem(task, alf.goals),
            "solvable": True,
        },
    }
    for file, data in contents.items():
        (folder / file).write_text(json.dumps(data), encoding="utf-8")
    return str(folder / "game.tw-pddl")


# ---------------------------------------------------------------------------------------------------------
# Making and playing

ENVS = {"taxi": DangerousTaxi, "autoexplore": AutoExplore, "alfworld": ALFWorld}


def env_class(name):
    """An environment's class by short name, or yours as `package.module:Class`."""
    if name in ENVS:
        return ENVS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"unknown environment {name!r}: one of {', '.join(ENVS)}, or package.module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load environment {name!r}: {error}") from None


def make(name, **options):
    """A new environment; options go to its constructor."""
    cls = env_class(name)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take these options {options}: {error}") from None
    return cls(**options)


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
    parser.add_argument("--env", default="taxi", help=f"{', '.join(ENVS)}, or package.module:Class (default: taxi)")
    parser.add_argument("--games", metavar="PATH", help="play these real ALFWorld games, with --env alfworld")
    parser.add_argument("--write-games", metavar="DIR", help="write ALFWorld's split as real game files, and stop")
    parser.add_argument("--split", default="train", help="split of the task: train, valid or test (default: train)")
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
    import envs  # what an environment of your own imports: another copy than this one, with another `UserError`

    envs.run_main(envs.main)
