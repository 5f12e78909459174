"""Pictures of success over episodes, or over what else was varied (matplotlib)."""

import re
import statistics

from envs import UserError
from plumbing.runs import read_log, runs_of


def plot(args):
    """The curves of all RL runs found, the seeds of one kind of run together."""
    curves = {}
    for folder in runs_of(args):
        for figures in read_log(folder):
            if "valid_success" in figures:
                points = curves.setdefault(re.sub(r"-s\d+$", "", folder.name).replace("-", " "), {})
                points.setdefault(figures["episodes"], []).append(figures["valid_success"])
    if not curves:
        raise UserError(f"no run of {args.env} in {args.runs} has been evaluated yet")
    draw_curves(curves, args.plot)


CURVE_LABELS = ("training episodes", "success on the validation panel")  # of both axes


def draw_curves(curves, path, stages=(), labels=CURVE_LABELS, scale="linear"):
    """Success over training episodes (or what `labels` says), `{title: {x: [success of each seed]}}`, to an image file.

    A line is the mean over seeds where all were evaluated, its band goes from the least to the most. `stages`: (name,
    share of the episodes). `scale`: of the x axis, "linear" or "log".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    last, place, done = max(map(max, curves.values())), -1.0, 0.0
    means = {}
    for title, points in curves.items():
        seeds = max(map(len, points.values()))
        means[title] = {at: statistics.fmean(points[at]) for at in sorted(points) if len(points[at]) == seeds}
    for title in sorted(means, key=lambda title: means[title][max(means[title])]):
        at, mean = list(means[title]), list(means[title].values())
        [line] = axes.plot(at, mean, marker="o", markersize=3)
        seeds = [curves[title][episodes] for episodes in at]
        axes.fill_between(at, list(map(min, seeds)), list(map(max, seeds)), color=line.get_color(), alpha=0.15)
        place = max(mean[-1], place + 0.05)  # names that would overlap stand above each other
        axes.annotate(title, (last, place), (6, 0), textcoords="offset points", color=line.get_color(), va="center",
                      annotation_clip=False)  # also above 1
    for name, share in stages:
        axes.axvline(done * last, color="gray", linewidth=0.6, linestyle=":")
        axes.annotate(name, (done * last, 1.01), color="gray", fontsize=8, rotation=40, annotation_clip=False)
        done += share
    first = 0 if scale == "linear" else min(map(min, curves.values()))
    if scale == "log":
        amounts = sorted(set().union(*curves.values()))
        axes.set_xscale("log")
        axes.set_xticks(amounts, map(str, amounts))
        axes.minorticks_off()
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1), xlim=(first, last))
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except ValueError as error:  # an ending that names no format
        raise UserError(f"{path}: {error}") from None
    print(f"wrote {path}")
