"""Draw the rooms and tasks of ALFWorld's built-in engine, and write them to tasks.json.gz.

house.json says which receptacles and objects a kind of room has, and what fits where. A room is drawn from these tables
with a seed of its own; its task asks for one of ALFWorld's six kinds of errand. The splits share no room:
their seeds differ, and so does their furniture (`layout_class`). A fifth of the combinations of room, object and target
are left out of training; every second task of `test` and `final` has one of these.

    python data/alfworld/prepare.py            # writes data/alfworld/tasks.json.gz
    python data/alfworld/prepare.py --check    # draws them again and compares; exit code 1 on a difference
"""

import argparse
import gzip
import json
import pathlib
import random
import sys
import zlib

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the folder of envs.py

import envs  # noqa: E402

FILE = HERE / "tasks.json.gz"
COUNTS = {"train": 300, "valid": 10, "test": 20, "final": 20}  # tasks of each of the six types
FIRST_SEEDS = {"train": 0, "valid": 1_000_000, "test": 2_000_000, "final": 3_000_000}
LAYOUTS = {"train": range(7), "valid": range(7, 8), "test": range(8, 10), "final": range(8, 10)}  # classes of furniture


def combinations(type_name):
    """All `(room, object, target)` that make a sensible task of a type, in the order of the tables."""
    tables, found = envs.household(), []
    for room, homes in tables["homes"].items():
        lamps = [thing for thing in homes if thing.endswith("lamp")]
        for thing in homes:
            if thing in lamps:
                continue
            if type_name.startswith("look"):
                found += [(room, thing, lamp) for lamp in lamps]
                continue
            for target in tables["rooms"][room]:
                if is_sensible(envs.treatment(type_name), room, thing, target):
                    found.append((room, thing, target))
    return found


def is_sensible(verb, room, thing, target):
    """Whether an object can be brought to a receptacle of a room after a treatment with `verb` (None: without one)."""
    tables = envs.household()
    if thing not in tables["holds"][target]:
        return False
    if verb is None:
        return True
    station = envs.STATIONS[verb]
    return thing in tables[verb + "able"] and station in tables["rooms"][room] and target != station


def draw_receptacles(task, rng):
    """Names of the 6 to 10 receptacles of a room, among them the target and a home of the object."""
    tables = envs.household()
    homes = tables["homes"][task["room"]]
    needed = set(homes.get(task["target"], [task["target"]]))  # a lamp needs a place of its own
    start = set(homes[task["object"]]) - {task["target"]}
    while True:
        names = []
        for name, (low, high) in tables["rooms"][task["room"]].items():
            for number in range(1, rng.randint(low, high) + 1):
                names.append(f"{name} {number}")
        kinds = {envs.kind(name) for name in names}
        if 6 <= len(names) <= 10 and kinds & needed and kinds & start:
            return names


def furnish(task):
    """Draw the room of a task from its seed: `(receptacles, {object: receptacle})`.

    Objects lie where such objects are kept, at most four in one place. The objects that the task asks for never start
    at its target.
    """
    # The text of the task seeds its room, so its form must stay as it is ("size": larger rooms existed once).
    drawn_from = {name: task[name] for name in ("type", "room", "object", "target", "seed")} | {"size": 1}
    rng = random.Random(json.dumps(drawn_from, sort_keys=True))
    receptacles, places = draw_receptacles(task, rng), {}
    homes = envs.household()["homes"][task["room"]]

    def place(thing, count):
        for number in range(1, count + 1):
            free = []
            for receptacle in receptacles:
                is_full = list(places.values()).count(receptacle) >= 4
                is_done = thing == task["object"] and envs.kind(receptacle) == task["target"]
                if envs.kind(receptacle) in homes[thing] and not is_full and not is_done:
                    free.append(receptacle)
            if free:
                places[f"{thing} {number}"] = rng.choice(free)

    place(task["object"], (2 if "two" in task["type"] else 1) + (rng.random() < 0.3))
    if task["target"] in homes:  # a lamp is an object, too
        place(task["target"], 1)
    for thing in rng.sample(sorted(homes), len(homes)):
        if thing not in (task["object"], task["target"]) and len(places) < 9:
            place(thing, rng.choice((1, 1, 2)))
    return receptacles, places


def layout_class(receptacles):
    """Which of ten classes the furniture of a room falls in. The splits use different classes, so a test room is never
    a training room with other things in it."""
    return zlib.crc32(" ".join(receptacles).encode()) % 10


def household_tasks(split):
    """The tasks of a split with their rooms, without `combination`."""
    tasks, seed = [], FIRST_SEEDS[split]
    taken = [task["receptacles"] for task in household_tasks("test")] if split == "final" else []
    for type_name, sentences in envs.household()["sentences"].items():
        pool = combinations(type_name)
        random.Random(0).shuffle(pool)
        cut = len(pool) // 5
        unseen, seen = pool[:cut], pool[cut : cut + COUNTS["train"]]
        for number in range(COUNTS[split]):
            if split in ("test", "final") and number % 2 == 1:
                room, thing, target = unseen[number // 2 % len(unseen)]
            else:
                room, thing, target = seen[number % len(seen)]
            task = {"type": type_name, "room": room, "object": thing, "target": target}
            while True:  # until the furniture is of a class of this split
                task["seed"] = seed
                receptacles, objects = furnish(task)
                seed += 1
                if layout_class(receptacles) in LAYOUTS[split] and receptacles not in taken:
                    break
            task["sentence"] = sentences[task["seed"] % len(sentences)].format(**task)
            tasks.append(task | {"receptacles": receptacles, "objects": objects})
    return tasks


def all_tasks():
    """`{split: [task]}`. `combination` says whether training has the task's object and target for its type, in any kind
    of room: two combinations that are left out in one room occur in another."""
    splits = {split: household_tasks(split) for split in COUNTS}
    trained = {(task["type"], task["object"], task["target"]) for task in splits["train"]}
    for tasks in splits.values():
        for task in tasks:
            is_seen = (task["type"], task["object"], task["target"]) in trained
            task["combination"] = "seen" if is_seen else "unseen"
    return splits


def main():
    parser = argparse.ArgumentParser(description="Draw ALFWorld's rooms and tasks.", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    text = json.dumps(all_tasks()).encode()
    if not args.check:
        FILE.write_bytes(gzip.compress(text, mtime=0))  # without a time stamp equal tasks give equal bytes
    elif gzip.decompress(FILE.read_bytes()) != text:
        sys.exit(f"{FILE.name} is not what prepare.py makes")


if __name__ == "__main__":
    envs.run_main(main)
