"""ALFWorld's real engine for `ALFWorld(games=PATH)`: game files (`*.tw-pddl`), played through TextWorld.

    python envs.py --env alfworld --env-option games=DIR

The optional packages are imported where they are used: pip install alfworld==0.4.2 textworld==1.7.0
"""

import importlib.metadata
import json
import pathlib
import re
import sys

from envs import THING, Notes, UserError, beside, household

engine = beside("alfworld/engine.py")
ALFWORLD_PIN = "alfworld==0.4.2 textworld==1.7.0"


def import_alfworld():
    """`textworld` and the wrapper of the optional `alfworld` that gives things their names, after a version check."""
    try:
        version = importlib.metadata.version("alfworld")
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    except (ImportError, OSError) as error:  # a missing package; alfworld makes a folder in ~/.cache when imported
        raise UserError(f"real ALFWorld games need alfworld ({error}): pip install {ALFWORLD_PIN}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 4):
        raise UserError(f"alfworld {version} is too old (it says `put`, not `move`): pip install {ALFWORLD_PIN}")
    return textworld, AlfredDemangler


def find_games(path):
    """The tasks of a directory of real games, `{split: [task]}`, found by their `game.tw-pddl` in sorted order.

    A folder named train, valid (or valid_seen), test (or valid_unseen) on the way to a game names its split, as in the
    official data; without one a game belongs to the test split. What ALFWorld itself leaves out (unsolvable games, and
    those with slices or movable receptacles) is left out here, and named.
    """
    root = pathlib.Path(str(path))
    files = [root] if root.is_file() else sorted(root.rglob("*.tw-pddl"))
    if not files:
        raise UserError(f"no game file (*.tw-pddl) in {str(path)!r}")
    # The official test split has no name of its own: papers report on `valid_unseen`.
    splits = {"train": "train", "valid": "valid", "valid_seen": "valid", "test": "test", "valid_unseen": "test"}
    games, left_out = {"train": [], "valid": [], "test": []}, []
    for file in files:
        names = file.relative_to(root).parts
        if not read_game(file).get("solvable", True) or re.search("movable|Sliced", " ".join(names)):
            left_out.append(str(file))
            continue
        data = trajectory_beside(file)
        task = {"type": data.get("task_type", "unknown"), "game": str(file)}
        if "task" in data:  # written by data/alfworld/write_games.py
            task["combination"] = data["task"].get("combination", "unknown")
        split = next((splits[name] for name in names if name in splits), "test")
        games[split].append(task)
    if left_out:
        print(f"note: {len(left_out)} games that ALFWorld leaves out: {', '.join(left_out)}", file=sys.stderr)
    return {split: found for split, found in games.items() if found}


def read_game(file):
    """The dictionary in a game file, or in the traj_data.json beside it."""
    try:
        data = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the game file {str(file)!r}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"cannot read the game file {str(file)!r}: it holds no JSON object")
    return data


def trajectory_beside(file):
    """The `traj_data.json` beside a game, or an empty dictionary."""
    beside = pathlib.Path(file).with_name("traj_data.json")
    return read_game(beside) if beside.exists() else {}


def goal_of(sentence):
    """`{"type", "object", "target"}` of a task sentence in ALFWorld's templates, None for free text. The target of
    `look_at_obj_in_light` is the lamp."""
    for name, templates in household()["sentences"].items():
        for template in templates:
            # The template with its two gaps as groups of a pattern.
            pattern = template.format(object=r"(?P<object>\w+)", target=r"(?P<target>\w+)")
            if match := re.fullmatch(pattern, sentence):
                return {"type": name, **match.groupdict()}
    return None


def goal_beside(file):
    """What `goal_of` gives, from a game's traj_data.json: needed where people wrote the task sentence."""
    data = trajectory_beside(file)
    if "pddl_params" not in data:
        return None
    params = data["pddl_params"]  # its names are PDDL's, `CounterTop`
    target = params["toggle_target" if data["task_type"].startswith("look") else "parent_target"]
    return {"type": data["task_type"], "object": params["object_target"].lower(), "target": target.lower()}


class House:
    """One game file, played by TextWorld, behind the interface of the built-in engine."""

    def __init__(self, task):
        self.task, file = task, str(task["game"])
        textworld, demangler = import_alfworld()
        read_game(file)  # a missing or broken file is the user's error, not TextWorld's
        self.goal = goal_beside(file)  # None where nothing stands beside it
        wanted = textworld.EnvInfos(won=True, admissible_commands=True)
        try:
            self.env = textworld.start(file, request_infos=wanted, wrappers=[demangler()])
        except Exception as error:  # a damaged game ends in errors of many types
            raise UserError(f"the game {file!r} cannot be played: {type(error).__name__}: {error}") from error

    def reset(self):
        self.state = self.env.reset()
        opening = sort_lists(self.state.feedback)
        # The sentence comes first: it is all that a player has. Sentences written by people fit no template.
        self.goal = goal_of(Notes(opening).sentence) or self.goal
        return opening

    def do(self, command):
        self.state = self.env.step(command)[0]
        return sort_lists(self.state.feedback)

    def commands(self):
        # `help` prints the same text in every state.
        return [command for command in self.state.admissible_commands if command != "help"]

    @property
    def won(self):
        return bool(self.state.won)


def sort_lists(observation):
    """An observation of the real engine with its enumerations in our order: theirs changes with PYTHONHASHSEED."""
    several = rf"a {THING}(?:,(?: and)? a {THING})+"
    return re.sub(several, lambda match: engine.listing(re.findall(rf"a ({THING})", match[0])), observation)
