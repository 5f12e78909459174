"""The teacher's reflection on a state of AutoExplore (paper, section 4.1: over optimal and perturbed steps).

A draft that belongs into negatives.py. The wording is regular and short: a small reflector has to learn it from the
state text: nearly everything it says can be read there. Only the direction of the next sub-goal uses the known target.
It names what fits the question but leaves the choice of the action to the policy.
"""

from envs import show_name, stem, words_of

GOALS = {"down": "Next: go down.", "up": "Next: go up.", "read": "Next: read a file here.",
         "identify": "Next: identify it.", "page": "Next: turn the page."}


def reflect_on_exploration(env, mistake=False):
    """What the question is about, what the last move brought, what fits here, and the next sub-goal.

    `mistake`: whether the last move was not the expert's.
    """
    words = list(dict.fromkeys(words_of(env.question)))
    verb, name = env.moves[env.expert_action()]
    parts = [f"Wanted: {' '.join(words[:5])}.", *reflect_on_last_move(env, words, mistake)]
    if verb == "cd" and name != "..":
        fits = env.matches(name)
        parts.append(f"{show_name(name)}/ fits {fits[0]}." if fits else "No name here fits.")
    elif verb == "cat":
        fits = env.matches(" ".join(env.cwd))
        parts.append(f"This place fits {fits[0]}." if fits else "It may be here.")
    elif verb == "cd":
        parts.append("It is not here.")
    elif verb == "id" and env.last != ("cat", name):
        parts.append(f"{show_name(name)} has it.")
    return " ".join([*parts, GOALS[sub_goal(verb, name)]])


def sub_goal(verb, name):
    if verb == "cd":
        return "up" if name == ".." else "down"
    return {"cat": "read", "id": "identify", "more": "page"}[verb]


def missing_words(env, words):
    """Words of the question that neither the file just read nor the path to it has: none if it answers."""
    known = {stem(word) for word in words_of(" ".join([env.result, *env.cwd]))}
    return [word for word in words if stem(word) not in known]


def reflect_on_last_move(env, words, mistake):
    verb, name = env.last
    if verb == "cat":
        shown = show_name(name)
        if env.cwd + (name,) in env.targets:
            return [f"{shown} has {' '.join(env.matches(env.result)[:3])}."]
        missing = missing_words(env, words)
        return [f"Mistake: {shown} lacks {' '.join(missing[:2])}." if missing else f"Mistake: {shown} does not answer."]
    if not mistake:
        return []
    if verb == "more":
        return ["Mistake: it was on another page."]
    return ["Mistake: it was further down." if name == ".." else f"Mistake: {show_name(name)}/ is the wrong way."]
