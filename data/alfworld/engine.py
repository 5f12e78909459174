"""The built-in engine of `envs.ALFWorld`: ALFWorld's rules and sentences (its `alfred.pddl` and `alfred.twl2`).

`real_engine.py` has the real one behind the same interface.
"""

import re

from envs import STATIONS, THING, TRAITS, household, in_order, kind, treatment


def listing(things):
    """ALFWorld's enumeration. It prints in the order of a Python set; ours is sorted."""
    words = [f"a {thing}" for thing in in_order(things)]
    if len(words) > 1:
        words[-1] = f"and {words[-1]}"
    return ", ".join(words) or "nothing"


class House:
    """A room with a task.

    It knows what is true; what the agent knows is in `Notes`. Left out: `help`, `slice` and things inside bowls.
    Parity with the real engine, command by command, is a test.
    """

    def __init__(self, task):
        self.task = task
        self.receptacles, self.sentence = task["receptacles"], task["sentence"]
        self.goal = {name: task[name] for name in ("type", "object", "target")}

    def reset(self):
        self.contents = {place: [] for place in self.receptacles}  # receptacle -> objects; the one in hand is in none
        self.shut = {place for place in self.receptacles if kind(place) in household()["openable"]}
        self.traits = {}  # object -> what was done to it, from TRAITS
        for thing, place in self.task["objects"].items():
            self.contents[place].append(thing)
            self.traits[thing] = set()
        self.here = self.hand = None
        self.lit = set()  # lamps that were ever used
        return (
            "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
            f"you see {listing(self.receptacles)}.\n\nYour task is to: {self.sentence}."
        )

    def commands(self):
        """The admissible commands, sorted as the real engine sorts them."""
        here, hand, tables = self.here, self.hand, household()
        found = ["look", "inventory"]
        found += [f"go to {place}" for place in self.receptacles if place != here]
        if hand:  # an object that lies somewhere cannot be examined: alfred.pddl's examineObject has a stray comma
            found.append(f"examine {hand}")
        if here is None:  # in the middle of the room, at the start
            return sorted(found)
        found.append(f"examine {here}")
        if kind(here) in tables["openable"]:
            found.append(f"open {here}" if here in self.shut else f"close {here}")
        for thing in self.contents[here]:
            if "lamp" in thing:  # a lamp is used where it stands
                found.append(f"use {thing}")
            elif not hand and here not in self.shut:
                found.append(f"take {thing} from {here}")
        for verb, station in STATIONS.items():  # a station works with its door shut
            if hand and kind(here) == station and kind(hand) in tables[verb + "able"]:
                found.append(f"{verb} {hand} with {here}")
        if hand and here not in self.shut and kind(hand) in tables["holds"][kind(here)]:
            found.append(f"move {hand} to {here}")
        return sorted(found)

    def do(self, command):
        """Carry out a command; the observation. What is not admissible changes nothing, as in ALFWorld."""
        if command not in self.commands():
            return "Nothing happens."
        verb, things = command.split()[0], re.findall(THING, command)
        thing, place = (*things, None, None)[:2]
        if verb == "look":
            if self.here:
                return f"You are facing the {self.here}. Next to it, you see nothing."
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        if verb == "inventory":
            return f"You are carrying: a {self.hand}." if self.hand else "You are not carrying anything."
        if verb == "examine":
            return self.look_of(thing)
        if verb == "go":
            self.here = thing
            return f"You arrive at {thing}. {self.look_of(thing)}"
        if verb == "open":
            self.shut.discard(thing)
            return f"You open the {thing}. {self.look_of(thing)}"
        if verb == "close":
            self.shut.add(thing)
            return f"You close the {thing}."
        if verb == "take":
            self.hand = thing
            self.contents[place].remove(thing)
            return f"You pick up the {thing} from the {place}."
        if verb == "move":
            self.hand = None
            self.contents[place].append(thing)
            return f"You move the {thing} to the {place}."
        if verb == "use":  # a lamp stays on: ALFWorld's goal asks whether it was ever used
            self.lit.add(thing)
            return f"You turn on the {thing}."
        if verb != "clean":  # hot and cool exclude each other
            self.traits[thing] -= {"hot", "cool"}
        self.traits[thing].add(TRAITS[verb])
        return f"You {verb} the {thing} using the {place}."

    def look_of(self, thing):
        """What one sees of a receptacle, or of the object in hand."""
        if thing != self.hand:
            if thing in self.shut:
                return f"The {thing} is closed."
            start = f"The {thing} is open. In it" if kind(thing) in household()["openable"] else f"On the {thing}"
            return f"{start}, you see {listing(self.contents[thing])}."
        if kind(thing) in household()["containers"]:
            return f"This is a normal {thing}. In it, you see nothing."
        traits = self.traits[thing]
        if not traits:
            return f"There's nothing special about {thing}."
        # The real engine calls a thing that is cool and not clean `cold`.
        words = "cold" if traits == {"cool"} else " and ".join(w for w in ("hot", "cool", "clean") if w in traits)
        return f"This is a {words} {thing}."

    @property
    def won(self):
        name, target, verb = self.task["object"], self.task["target"], treatment(self.task["type"])
        if self.task["type"].startswith("look"):
            # The lamp is beside the agent and was used at any time; the object is in hand.
            lit_here = self.lit.intersection(self.contents.get(self.here, ()))
            return self.hand is not None and kind(self.hand) == name and target in map(kind, lit_here)
        for place, things in self.contents.items():
            ready = 0
            for thing in things:
                ready += kind(thing) == name and (verb is None or TRAITS[verb] in self.traits[thing])
            # Two objects must be in the same receptacle.
            if kind(place) == target and ready >= (2 if "two" in self.task["type"] else 1):
                return True
        return False
