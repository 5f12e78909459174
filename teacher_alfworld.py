"""The teacher of ALFWorld: reflections by rule. (Draft: to be moved into negatives.py, beside the other teachers.)

A reflection says where the agent is, whether the last action was of no use, what is known of the object, and the next
sub-goal. It is a function of what the state text shows, so that equal states have equal reflections. It names no
command: going, opening and taking, and which of several shelves to try, are left to the policy.
"""

import envs


def useless(env):
    """Whether the state itself shows that the last action brought nothing; never true after the expert's own action."""
    notes, (goal_verb, thing, place) = env.notes, env.subgoal()
    verb, *_ = notes.command.split()
    here = envs.kind(notes.here) if notes.here else None
    if verb == "take":
        return goal_verb == "drop" or (goal_verb == "place" and notes.origin == place)
    if verb == "move":
        moved = " ".join(notes.command.split()[1:3])
        return envs.kind(moved) == env.goal["object"] and not (here == env.goal["target"] and env.ready(moved))
    if verb in envs.STATIONS:
        return verb != envs.treatment(env.goal["type"])
    if verb in ("go", "open") and place:
        return not notes.command.endswith(f" {place}")
    if verb == "go":  # an unlikely place, where a likely one was still to be searched
        likely = envs.homes_of(thing)
        return here not in likely and any(envs.kind(other) in likely for other in notes.unsearched())
    if verb == "examine":  # another place than here can be examined where two are side by side: that is a search
        return notes.command.removeprefix("examine ") in (notes.here, notes.hand)
    return verb in ("look", "inventory", "close", "use") and not env.success


def whereabouts(env):
    """What is known of the object that the task is about."""
    notes, name = env.notes, env.goal["object"]
    if notes.hand and envs.kind(notes.hand) == name:
        return f"The {notes.title(notes.hand)} is in hand."
    places = notes.where(name)
    placed = [thing for thing, place in places.items() if envs.kind(place) == env.goal["target"] and env.ready(thing)]
    known = [f"The {notes.title(thing)} is in {place}." for thing, place in places.items() if thing not in placed]
    return " ".join([f"The {thing} is placed." for thing in placed[:1]] + known[:1]) or f"The {name} is not found."


def errand(env):
    """The next sub-goal in words."""
    verb, thing, place = env.subgoal()
    name = envs.kind(thing)
    if verb == "find":
        homes = envs.homes_of(name)
        left = dict.fromkeys(envs.kind(other) for other in envs.likely(name, env.notes.unsearched()))
        hints = [home for home in left if home in homes][:2]
        return f"find the {name}, perhaps in a {' or a '.join(hints)}" if hints else f"find the {name} in another place"
    if verb in envs.STATIONS:
        return f"{verb} the {name} at the {envs.kind(place)}"
    return {"take": f"get the {name}", "drop": f"put down the {name}", "use": f"light the {name} in {place}",
            "place": f"bring the {name} to the {env.goal['target']}"}[verb]


def reflect_on_household(env, mistake):
    """Where am I, was the last action of use, what do I know, what is to be done; at most about 45 tokens."""
    notes = env.notes
    here = (notes.here or "the middle of the room") + (", which is closed" if notes.here in notes.shut else "")
    wrong = f"To {notes.command.split()[0]} was of no use. " if mistake and useless(env) else ""
    return f"{wrong}I am at {here}. {whereabouts(env)} Next goal: {errand(env)}."
