"""Episodes that a run has played, kept in its folder (`episodes/`), so that a table is drawn again without playing."""

import hashlib
import inspect
import json
from pathlib import Path

import envs
import reflect_rl
from plumbing.options import env_factory
from reflect_rl import Episode, Step


def panel_of(args, adapters, most):
    """All that decides what is played, as JSON: other settings, tasks or weights have a file of their own."""
    env = env_factory(args)()
    panel = {"split": args.split, "repeats": args.repeats, "panel": most, "env_option": sorted(args.env_option)}
    panel |= {"base": args.base, "dtype": args.dtype, "max_reflection": args.max_reflection, "horizon": env.horizon}
    # What plays, and what is played: the episodes of code that was changed since are played again.
    code = [envs.__file__, reflect_rl.__file__, inspect.getsourcefile(type(env).step)]
    panel["source"] = digest([Path(path).read_text(encoding="utf-8") for path in code])
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in adapters]
    return panel | {"tasks": digest(env.tasks(args.split)), "players": [hashlib.sha256(w).hexdigest() for w in weights]}


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_episodes(path):
    """The episodes of a file, behind the line that says what they are; None where it is not there or damaged."""
    episodes = []
    try:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]:
            fields = json.loads(line)
            episodes.append(Episode(**{**fields, "steps": [Step(**step) for step in fields["steps"]]}))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return episodes
