"""Write tasks of ALFWorld's built-in engine as game files, which the real engine plays.

A room becomes a problem in PDDL for ALFWorld's own domain; its folder has the layout of the official data:
DIR/split/task/trial/game.tw-pddl with a traj_data.json beside it. Needs the optional package alfworld.

    python data/alfworld/write_games.py --split test --out games
    python eval.py --env alfworld --env-option games=games --run runs/NAME
"""

import argparse
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the folder of envs.py

import envs  # noqa: E402

# The names as PDDL has them (`CounterTop`), by the names that the games show (`countertop`).
NAMES = re.findall(r'"([A-Z]\w+)"', (HERE / "house.json").read_text(encoding="utf-8"))
CAMEL = {name.lower(): name for name in NAMES}


def camel(thing):
    """The PDDL name of the kind of a thing: `CounterTop` of `countertop 1`."""
    return CAMEL[envs.kind(thing)]


def pddl_ids(names):
    """PDDL identifiers that ALFWorld turns back into our names: it numbers things of a kind by falling identifier."""
    ids = {}
    for name in names:
        count = sum(envs.kind(other) == envs.kind(name) for other in names)
        rank = count - int(name.split()[1])
        start, end = camel(name), ""
        if start.endswith("Basin"):  # the official data call a `SinkBasin` so
            start, end = start.removesuffix("Basin"), f"_bar_{start}"
        ids[name] = f"{start}_bar__plus_00_dot_{rank:02d}{end}"
    return ids


def declarations(task, ids, locations):
    """The typed objects of the problem, and the facts of what can contain what."""
    receptacle_kinds = set(envs.STATIONS.values())  # the domain itself names three stations and two knives
    object_kinds = {"knife", "butterknife"}
    receptacle_kinds.update(map(envs.kind, task["receptacles"]))
    object_kinds.update(map(envs.kind, task["objects"]))

    typed = ["agent1 - agent", "loc_bar_0 - location"]
    typed += [f"{location} - location" for location in locations.values()]
    typed += [f"{CAMEL[name]}Type - rtype" for name in sorted(receptacle_kinds)]
    typed += [f"{CAMEL.get(name, name)}Type - otype" for name in sorted(object_kinds)]
    typed += [f"{ids[place]} - receptacle" for place in task["receptacles"]]
    typed += [f"{ids[thing]} - object" for thing in task["objects"]]

    can_contain = []
    for place in sorted(receptacle_kinds):
        for thing in envs.household()["holds"][place]:
            if thing in object_kinds:
                can_contain.append(f"canContain {CAMEL[place]}Type {CAMEL[thing]}Type")
    return typed, can_contain


def object_facts(thing, name):
    """What can be done to an object whose PDDL identifier is `name`."""
    facts, tables = [], envs.household()
    for trait in ("cleanable", "heatable", "coolable"):
        if envs.kind(thing) in tables[trait]:
            facts.append(f"{trait} {name}")
    facts.append(f"toggleable {name}" if "lamp" in thing else f"pickupable {name}")
    if envs.kind(thing) in tables["containers"]:
        facts.append(f"isReceptacleObject {name}")
    return facts


def pddl_problem(task, goal):
    """A task as a PDDL problem. `goal` is ALFWorld's template of the goal; it closes the problem, too."""
    ids = pddl_ids([*task["receptacles"], *task["objects"]])
    locations = {}
    for number, place in enumerate(task["receptacles"], 1):
        locations[place] = f"loc_bar_{number}"
    typed, facts = declarations(task, ids, locations)
    facts += ["atLocation agent1 loc_bar_0", "= (total-cost) 0"]
    for place in task["receptacles"]:
        facts.append(f"receptacleType {ids[place]} {camel(place)}Type")
        facts.append(f"receptacleAtLocation {ids[place]} {locations[place]}")
        if envs.kind(place) in envs.household()["openable"]:
            facts.append(f"openable {ids[place]}")
    for thing, place in task["objects"].items():
        facts.append(f"objectType {ids[thing]} {camel(thing)}Type")
        facts.append(f"inReceptacle {ids[thing]} {ids[place]}")
        facts.append(f"objectAtLocation {ids[thing]} {locations[place]}")
        facts += object_facts(thing, ids[thing])
    target = camel(task["target"])
    goal = goal.format(obj=camel(task["object"]), recep=target, toggle=target).replace("#", "-")
    objects = "\n  ".join(typed)
    init = "\n  ".join(f"({fact})" for fact in facts)
    return f"(define (problem room)\n (:domain alfred)\n (:objects\n  {objects}\n )\n (:init\n  {init}\n )\n{goal}"


def write_game(task, directory):
    """Write a task of the built-in engine as a game of the real one; the path of the game file."""
    if not isinstance(task, dict) or "game" in task:
        raise envs.UserError(f"only a task of the built-in ALFWorld can be written as a game, not {str(task)[:200]}")
    envs.beside("alfworld/real_engine.py").import_alfworld()
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    looks, target, thing = task["type"].startswith("look"), camel(task["target"]), camel(task["object"])
    name = f"{task['type']}-{thing}-None-{target}-{task['seed']}"  # as the official data name them
    folder = pathlib.Path(directory) / name / f"trial_{task['seed']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    params = {
        "object_target": thing,
        "parent_target": "" if looks else target,
        "mrecep_target": "",
        "toggle_target": target if looks else "",
        "object_sliced": False,
    }
    trajectory = {"task_type": task["type"], "pddl_params": params, "task": task}
    grammar = pathlib.Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8")
    game = {
        "pddl_domain": pathlib.Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8"),
        "grammar": grammar.replace("UNKNOWN GOAL", task["sentence"]),
        "pddl_problem": pddl_problem(task, gdict[task["type"]]["pddl"]),
        "solvable": True,
    }
    (folder / "traj_data.json").write_text(json.dumps(trajectory), encoding="utf-8")
    (folder / "game.tw-pddl").write_text(json.dumps(game), encoding="utf-8")
    return str(folder / "game.tw-pddl")


def main():
    parser = argparse.ArgumentParser(description="Write ALFWorld tasks as real game files.", allow_abbrev=False)
    parser.add_argument("--split", default="test", help="train, valid or test (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to, in a folder for the split")
    args = parser.parse_args()
    for task in envs.make("alfworld").tasks(args.split):
        print(write_game(task, pathlib.Path(args.out) / args.split))


if __name__ == "__main__":
    envs.run_main(main)
