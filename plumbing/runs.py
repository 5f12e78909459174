"""Runs: runs/NAME/ holds config.json, log.jsonl, checkpoint.pt and the adapters. Written by one process at a time; gone
on from after any kill."""

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import filelock
import torch

import envs
from envs import UserError
from plumbing.options import short_name
from plumbing.processes import rank

# Options that may differ on resume: they say where, how fast or how often, or are told by another one.
MAY_DIFFER = ("runs", "resume", "name", "device", "dtype", "gradient_checkpointing", "micro_batch", "repos",
              "no_negatives", "repeats", "split")
MOST_WEIGHT = 1e6  # a larger trained weight is not saved


def settings_of(args):
    """The options that decide a run's numbers, as JSON reads them again."""
    settings = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER}
    if settings.get("data"):  # other records under the same name are other settings
        settings["data_digest"] = hashlib.sha256(Path(settings["data"]).read_bytes()).hexdigest()[:12]
    return json.loads(json.dumps(settings))


def write(path, content):
    """Write a file beside its place and rename it in: a reader sees the old content or the new one, never half."""
    beside = Path(f"{path}.tmp")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    beside.replace(path)


def read_config(folder):
    """The settings of a run; a `UserError` where the folder holds none that can be used."""
    kinds = {"env": str, "base": str, "labels": str, "max_reflection": int, "env_option": list}
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        wrong = [key for key, kind in kinds.items() if not isinstance(config[key], kind)]
        dict(config["env_option"])  # pairs of name and value
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is no run: its config.json cannot be read ({error!r})") from None
    if wrong:
        raise UserError(f"{folder} is no run: {', '.join(wrong)} in its config.json has a value of another kind")
    return config


def read_log(folder):
    """The lines of a run's log, one dict an update; what a kill left half written is left out."""
    path, lines = Path(folder) / "log.jsonl", []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                figures = json.loads(line)
                if isinstance(figures, dict) and isinstance(figures.get("step"), int):
                    lines.append(figures)
    return lines


def check_settings(folder, args, resume):
    """Refuse to write over a run, or to go on with other settings than its own."""
    if not (folder / "config.json").exists():
        return
    if not resume:
        raise UserError(f"{folder} exists already: go on with --resume, or give another --name")
    old, new = read_config(folder), settings_of(args)
    changed = [f"{key} {old.get(key)!r}, now {new[key]!r}" for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(f"{folder} was started with other settings: {', '.join(changed)}")


class Run:
    """A folder that is written by one process at a time, and can be gone on from after any kill."""

    def __init__(self, folder, args, resume=False, wait=False):
        self.folder = Path(folder)
        if rank() > 0:  # under torchrun the first process writes
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # The operating system gives the lock back when the process ends, however it ends.
        self.lock = filelock.FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise UserError(f"another process is writing {folder}") from None
        check_settings(self.folder, args, resume)
        if (self.folder / "config.json").exists():
            return
        if (self.folder / "log.jsonl").exists() or (self.folder / "checkpoint.pt").exists():
            raise UserError(f"{folder} holds a run without its config.json: give another --name")
        write(self.folder / "config.json", json.dumps(settings_of(args), indent=2) + "\n")

    def log(self, figures):
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")  # one write: a kill leaves a whole line or the start of one

    def save(self, step, parameters, optimizer, **more):
        """A checkpoint, written beside the old one and renamed over it: a kill leaves the one or the other."""
        # NaN is not below the bound either. Larger weights end in NaN soon, and each resume would fail the same way.
        if not all((parameter.abs() < MOST_WEIGHT).all() for parameter in parameters):
            raise UserError(f"update {step}: the weights grow without bound; the checkpoint before it is kept")
        weights = [parameter.detach().cpu() for parameter in parameters]
        state = {"step": step, "parameters": weights, "optimizer": optimizer.state_dict(), "more": more}
        beside = self.folder / "checkpoint.tmp"
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # what torch makes of a full disk
            raise UserError(f"cannot write {beside}: {str(error).splitlines()[0]}") from None
        beside.replace(self.folder / "checkpoint.pt")

    def restore(self, parameters, optimizer):
        """Put the checkpoint in place and cut the log back to it: `(updates done, what else was saved)`."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            if rank() == 0:  # not even an evaluation before the first update counts
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            return 0, {}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, saved in zip(parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
            step, more = state["step"], state["more"]
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from None
        if rank() == 0:
            kept = [figures for figures in read_log(self.folder) if figures["step"] <= step]
            write(self.folder / "log.jsonl", "".join(json.dumps(figures) + "\n" for figures in kept))
        return step, more


def write_budget(folder, records, updates, episodes=0):
    """What an adapter was made of, to be shown beside its success: only equal budgets can be compared."""
    write(folder / "budget.json", json.dumps({"records": records, "updates": updates, "episodes": episodes}) + "\n")


def budget_of(adapters):
    """Records, updates of all adapters together and episodes of RL; an empty dict where that is not known."""
    total = {"records": 0, "updates": 0, "episodes": 0}
    try:
        for folder in adapters:
            budget = json.loads((Path(folder) / "budget.json").read_text(encoding="utf-8"))
            total["records"] = max(total["records"], budget["records"])  # both players learn from the same ones
            total["updates"] += budget["updates"]
            total["episodes"] += budget["episodes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return total


def run_name(args):
    """`--name`, or one made of what the run is: `taxi-rl-ppo-no-curriculum-s0`."""
    if args.name:
        if Path(args.name).name != args.name or args.name == "..":
            raise UserError(f"--name {args.name} must stay inside the folder of all runs (--runs)")
        return args.name
    parts = [short_name(args.env), "rl"]
    if args.algo != "reinforce":
        parts.append(args.algo)
    for name in ("reflection", "negatives", "sft", "curriculum", "milestone"):
        if not getattr(args, name):
            parts.append(f"no-{name}")
    if args.replay and args.algo != "paper":
        parts.append("replay")
    return "-".join([*parts, f"s{args.seed}"])


def runs_of(args):
    """The folders of all runs of `args.env`, oldest first; what is no run is named and left out."""
    found = []
    for path in Path(args.runs).glob("*/config.json"):
        try:
            if read_config(path.parent)["env"] == args.env:
                found.append((path.stat().st_mtime, path.parent))
        except UserError as error:
            print(f"note: {error}")
    return [folder for _, folder in sorted(found)]


def adapters_of(folder):
    """`{name: folder}` of the adapters of a run that play together."""
    found = {}
    for name in ("reflect", "policy"):
        if (Path(folder) / name / "adapter_config.json").is_file():
            found[name] = Path(folder) / name
    if "reflect" not in found and "updates" not in read_config(folder):  # an SFT run: its policy reads reflections
        raise UserError(f"{folder} holds no reflector yet: python sft.py without --stage trains both players")
    if "policy" not in found:
        raise UserError(f"{folder} holds no policy yet: it was stopped before it was saved")
    return found


def as_trained(args, folder):
    """`args` with the environment, model, labels and reflection limit that a run was trained with.

    Of the environment's options those given now win. A module is imported only where the command line names it: a run
    from elsewhere must not execute anything.
    """
    config = read_config(folder)
    if config["env"] != args.env and config["env"] not in envs.ENVS:
        raise UserError(f"{folder} plays {config['env']}: say so with --env, its module is not imported unasked")
    if "games" in dict(config["env_option"]) and "games" not in dict(args.env_option):  # TextWorld evaluates their text
        raise UserError(f"{folder} played real games: say which with --env-option games=PATH")
    kept = {key: config[key] for key in ("env", "base", "labels", "max_reflection")}
    options = [*map(tuple, config["env_option"]), *args.env_option]
    return argparse.Namespace(**{**vars(args), **kept, "env_option": options})
