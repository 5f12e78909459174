"""The experiments behind the tables: each claim of the paper as rows that had the same data, episodes and updates.

A study is a list of rows; each is trained and evaluated for every seed by the same functions as `python rl.py`, both
stages of SFT to the minimum of their held-out loss (`auto`). Runs that are finished are not made again, so a study goes
on where it was stopped, and two processes may do different seeds side by side (`--seeds 0,2` and `--seeds 1,3`, then
once more with all). The rows are written to STUDY-ENV-TRAJECTORIES-SPLIT.jsonl beside this file, from which the tables
and pictures in docs/ are drawn.

    python results/study.py reflection --env taxi --seeds 0,1,2,3,4
    python results/study.py reflection --env taxi --draw             # the table from the file, nothing is played
    python results/study.py reflection --env taxi --draw --picture curves.png      # and the curves
    python results/study.py amount --env taxi --draw --picture amounts.png         # of all its files, success by --few
"""

import argparse
import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import curriculum  # noqa: E402
import envs  # noqa: E402
import eval as evaluation  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from envs import UserError  # noqa: E402
from plumbing.curves import draw_curves  # noqa: E402
from plumbing.options import COMMON, add_options, env_factory, parse_args  # noqa: E402
from plumbing.rows import read_rows, write_rows  # noqa: E402
from plumbing.runs import budget_of, read_log  # noqa: E402
from reflect_rl import load_players  # noqa: E402

STUDIES = {  # row -> options of rl.py; rows of SFT alone are evaluated on the way
    "reflection": {
        "without reflection, SFT + RL": {"reflection": False},
        "with reflection, SFT + RL": {},
        "without reflection, RL only": {"reflection": False, "sft": False},
        "with reflection, RL only": {"sft": False},
    },
    "curriculum": {
        "no curriculum": {"curriculum": False},
        "stages": {"milestone": False},
        "stages and milestone": {},
    },
    "algorithms": {
        "REINFORCE": {},
        "RLOO": {"algo": "rloo"},
        "GRPO": {"algo": "grpo"},
        "PPO": {"algo": "ppo"},
        "as the authors' code": {"algo": "paper"},
    },
    "amount": {"with reflection, SFT + RL": {}},  # of trajectories: `--few 10`, then `--few 50`, ...
}
# Trajectories that leave SFT short of its ceiling: with thousands there is nothing left for RL to add.
FEW = {"taxi": 20, "alfworld": 100, "autoexplore": 400}
WEAK = {"taxi": 5, "alfworld": 25, "autoexplore": 100}  # for the curriculum, which is to help a weak start


def arm(args, **changes):
    """Options of one row."""
    return argparse.Namespace(**{**vars(args), **changes})


def titled(row, title, seed):
    """A row under its title; the seed is what `evaluation.pooled` joins."""
    return row | {"name": f"{title}-s{seed}"}


def rows_of(args, rows):
    """The rows of one seed: those of SFT, those of the study, and SFT with the updates of everything."""
    found, largest, learned = [], 0, {}
    for title, changes in rows.items():
        own = arm(args, **changes)
        own.resume = (pathlib.Path(own.runs) / rl.run_name(own) / "config.json").exists()
        [[*before, after]] = rl.pipeline(own, [args.split])
        found.append(titled(after, title, args.seed) | {"curve": curve_of(own)})
        largest = max(largest, after["budget"][0].get("updates", 0))
        if own.sft:
            learned[own.reflection] = own
            wanted = "with reflection" if own.reflection else "without reflection"
            [row] = [row for row in before if row["name"].endswith(wanted)]
            if f"{wanted}, SFT-s{args.seed}" not in [row["name"] for row in found]:
                found.append(titled(row, f"{wanted}, SFT", args.seed))
    if len(learned) > 1:
        found += [longer(own, reflection, largest) for reflection, own in learned.items()]
        own = learned[False]  # RL without reflection, and as many updates in all as with it
        rl_updates = own.updates * own.epochs * own.minibatches
        own = arm(own, policy_steps=largest - rl_updates, name=f"{rl.run_name(own)}-longer")
        own.resume = (pathlib.Path(own.runs) / own.name / "config.json").exists()
        [[*_, after]] = rl.pipeline(own, [args.split])
        found.append(titled(after, "without reflection, SFT longer + RL", args.seed) | {"curve": curve_of(own)})
    return found


def curve_of(args):
    """Validation success of a run, `[[episodes, success], ...]`."""
    points = []
    for line in read_log(pathlib.Path(args.runs) / rl.run_name(args)):
        if "valid_success" in line:
            points.append([line["episodes"], line["valid_success"]])
    return points


def longer(own, reflection, updates):
    """SFT alone with as many updates as the largest budget of the study, the reflector's included."""
    folder = sft.folder_of(own)
    stage, more = ("policy" if reflection else "plain"), arm(own)
    more.policy_steps = updates - budget_of([folder / "reflect"])["updates"] * reflection
    target = sft.folder_of(more)
    for name in ["reflect", "data"] if reflection else ["data"]:  # the reflector stays the same one
        if not (target / name).exists():
            shutil.copytree(folder / name, target / name)
    sft.run(more, [stage])
    wanted = "with reflection" if reflection else "without reflection"
    [row] = [row for row in evaluation.run_rows(target, more) if row["name"].endswith(wanted)]
    return titled(row, f"{wanted}, SFT longer", own.seed)


def options_of(parser):
    """`(rl.py's options, the study's own, file of the rows)` from the command line."""
    own = {
        "seeds": ("0,1,2", "seeds, with commas"),
        "few": (0, "trajectories of the teacher; 0 = what leaves SFT short of its ceiling", 0),
        "split": ("test", "split of the panel"),
        "leave_out": ("", "title of a row that is not made, such as 'with reflection, RL only'"),
        "draw": (False, "draw the table from the file; train and play nothing"),
        "picture": ("", "draw the learning curves, or success by amount of data, to this file as well"),
    }
    fixed = {"name": "", "resume": False, "seed": 0, "data": "", "trajectories": 0}
    fixed |= {"reflect_steps": "auto", "policy_steps": "auto"}
    panel = {"repeats": evaluation.OPTIONS["repeats"]}
    options = COMMON | sft.DATA_OPTIONS | sft.OPTIONS | rl.OPTIONS | panel | own
    add_options(parser, {name: row for name, row in options.items() if name not in fixed})
    args = arm(parse_args(parser), **fixed)
    if args.env not in envs.ENVS:
        raise UserError("a study plays taxi, autoexplore or alfworld")
    args.trajectories = args.few or (WEAK if args.study == "curriculum" else FEW)[args.env]
    if args.study == "amount":  # the runs of several amounts have the same names
        args.runs = str(pathlib.Path(args.runs) / f"few-{args.trajectories}")
    path = HERE / f"{args.study}-{args.env}-{args.trajectories}-{args.split}.jsonl"
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise UserError(f"--seeds {args.seeds!r}: numbers with commas between them")
    more = argparse.Namespace(seeds=list(map(int, args.seeds.split(","))))
    for name in ("study", "draw", "picture", "leave_out"):  # what is no setting of a run
        setattr(more, name, getattr(args, name))
        delattr(args, name)
    del args.seeds, args.few
    return args, more, path


def place_of(row):
    """Where a row stands in its table: what is expected to be better comes later, so that differences are gains."""
    title = row["name"].rpartition("-s")[0]
    stages = ["RL only", "SFT", "SFT longer", "SFT + RL", "SFT longer + RL"]
    stage = title.rpartition("reflection, ")[2]
    place = stages.index(stage) if stage in stages else len(stages)  # rows of another kind come last
    return place == len(stages), title.startswith("with "), place, row["name"]


def draw(path, env):
    """The table of a file of rows; where there are several seeds, of their means."""
    rows = read_rows(path, env)
    unlearned = [row for row in rows if row["name"] in ("random", "expert", "untuned base")]
    learned = sorted((row for row in rows if row not in unlearned), key=place_of)
    evaluation.print_table(unlearned + (evaluation.pooled(learned) or learned))
    for row in learned:
        reached = [episodes for episodes, success in row.get("curve", ()) if success >= 0.5]
        if row.get("curve"):
            print(f"{row['name']}: 50% of the validation panel after {reached[0] if reached else 'no'} episodes of RL")


def picture(path, env, out):
    """The learning curves of a file of rows, each line named where it ends."""
    curves = {}
    for row in read_rows(path, env):
        for episodes, success in row.get("curve", []):
            points = curves.setdefault(row["name"].rpartition("-s")[0], {})
            points.setdefault(episodes, []).append(success)
    stages = curriculum.stages_of(env)
    total = sum(stage.share for stage in stages)
    draw_curves(curves, out, [(stage.name, stage.share / total) for stage in stages])


def picture_of_amounts(path, env, out):
    """Test success over the number of teacher trajectories, from the files of all amounts beside `path`: of the seeds
    that all of them have."""
    found = []  # (title, amount, seed, success)
    for file in path.parent.glob(re.sub(r"-\d+-", "-*-", path.name)):
        amount = int(re.search(r"-(\d+)-", file.name)[1])
        rows = read_rows(file, env)
        for row in rows:
            title, _, seed = row["name"].rpartition("-s")
            if seed.isdigit():
                found.append((title, amount, seed, evaluation.summary(row["sampled"][0])["success"]))
    seeds_of = {}  # amount -> its seeds
    for _, amount, seed, _ in found:
        seeds_of.setdefault(amount, set()).add(seed)
    curves, seeds = {}, set.intersection(*seeds_of.values())
    for title, amount, seed, success in found:
        if seed in seeds:
            curves.setdefault(title, {}).setdefault(amount, []).append(success)
    labels = ("teacher trajectories", f"success on the {rows[0]['split']} panel")
    draw_curves(curves, out, labels=labels, scale="log")


def main():
    parser = argparse.ArgumentParser(description="The experiments behind the tables.")
    parser.add_argument("study", choices=STUDIES)
    args, own, path = options_of(parser)
    if not own.draw:
        rows = evaluation.baseline_rows(args)
        rows.append(evaluation.row("untuned base", lambda: load_players(args, {}), args))
        for seed in own.seeds:
            kept = {title: changes for title, changes in STUDIES[own.study].items() if title != own.leave_out}
            rows += rows_of(arm(args, seed=seed), kept)
        write_rows(rows, path)
    draw(path, env_factory(args)())
    if own.picture:
        (picture_of_amounts if own.study == "amount" else picture)(path, env_factory(args)(), own.picture)


if __name__ == "__main__":
    envs.run_main(main)
