"""Intervals, summaries, the panel, baselines, tables."""

import argparse
import functools
import json
import math
import shutil
import types

import pytest
from conftest import run_script, table_of, tiny_options
from corridor import Corridor

import envs
import eval as evaluation
from envs import UserError
from reflect_rl import Episode, Step, newest_run, runs_of

# Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score interval without continuity correction)
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize("successes, n, low, high", [*NEWCOMBE, (20, 20, 1 - 0.1611, 1.0), (5, 10, 0.2366, 0.7634)])
def test_wilson_equals_published_values(successes, n, low, high):
    """Catches the Wald interval (which is empty at 0 and 1) and a slip in the formula."""
    assert evaluation.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("successes, n", [(1, 7), (50, 90), (89, 90), (260, 270)])
def test_wilson_bounds_are_where_the_score_test_turns(successes, n):
    """The definition itself: at each bound p, |observed - p| is z standard errors of p."""
    for p in evaluation.wilson(successes, n):
        assert abs(successes / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))


def test_wilson_of_nothing_is_everything():
    assert evaluation.wilson(0, 0) == (0.0, 1.0)


def episode(rewards, terminated, success):
    last = len(rewards) - 1
    steps = [
        Step(
            "s", None, ("a",), 0, 0.0, r, terminated and i == last, not terminated and i == last, success and i == last
        )
        for i, r in enumerate(rewards)
    ]
    return Episode(0, tuple(steps), "end", ("a",))


def test_summary_takes_the_environments_verdict():
    """Catches success read off the return (a failure may pay more), and running out of time counted as danger."""
    episodes = [
        episode([0.1, 0.1], True, True),
        episode([5.0], True, False),
        episode([-1.0] * 3, False, False),
        episode([0.0] * 4, False, True),
    ]
    found = evaluation.summary(episodes)
    assert found["episodes"] == 4 and found["success"] == 0.5 and found["failed"] == 0.25
    assert found["return"] == pytest.approx((0.2 + 5 - 3 + 0) / 4) and found["length"] == (2 + 1 + 3 + 4) / 4
    assert found["interval"] == evaluation.wilson(2, 4)


class Watched(Corridor):
    """Notes which tasks are played."""

    played = []

    def reset(self, *, seed=None, options=None):
        Watched.played.append((tuple(options["task"]), {k: v for k, v in options.items() if k != "task"}))
        return super().reset(seed=seed, options=options)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("greedy", [True, False])
def test_the_panel_is_the_whole_split_and_nothing_else(split, greedy):
    """Catches splits mixed up, tasks drawn at random, curriculum options left on."""
    Watched.played = []
    episodes = evaluation.evaluate(evaluation.random_actor, Watched, split, repeats=3, greedy=greedy)
    tasks = Corridor().tasks(split)
    assert [e.task for e in episodes] == tasks * (1 if greedy else 3)
    assert sorted(task for task, _ in Watched.played) == sorted(map(tuple, tasks * (1 if greedy else 3)))
    assert all(options == {} for _, options in Watched.played)


def test_repeats_differ_and_panels_are_equal():
    """Catches one sampled episode counted three times, and a panel that is new at each call."""
    first = evaluation.evaluate(evaluation.random_actor, Corridor, "test", repeats=8)
    assert first == evaluation.evaluate(evaluation.random_actor, Corridor, "test", repeats=8)
    assert len({tuple(step.action for step in e.steps) for e in first if e.task == first[0].task}) > 1


def test_baselines():
    """Catches an expert that is sampled, and a random actor that is not uniform."""
    assert all(e.success for e in evaluation.evaluate(evaluation.expert_actor, Corridor, "test"))
    episodes = evaluation.evaluate(evaluation.random_actor, Corridor, "test", repeats=200)
    steps = [step for e in episodes for step in e.steps]
    right = sum(step.action for step in steps) / len(steps)
    assert abs(right - 0.5) < 5 * 0.5 / math.sqrt(len(steps)), "five standard errors off: one in two million by chance"


def test_a_split_without_tasks_is_a_user_error():
    class Empty(Corridor):
        def tasks(self, split):
            return []

    with pytest.raises(UserError, match="test"):
        evaluation.evaluate(evaluation.random_actor, Empty)


def test_table_shows_the_figures(capsys):
    """Catches columns in another order than their headings: success, interval, n, return, length, failed; greedy."""
    args = types.SimpleNamespace(split="test", repeats=2)
    actors = {"random": evaluation.random_actor, "expert": evaluation.expert_actor}
    rows = [evaluation.row(name, actor, Corridor, args) for name, actor in actors.items()]
    evaluation.print_table(rows)
    out = capsys.readouterr().out
    assert "test split" in out and list(table_of(out)) == ["random", "expert"]
    s = rows[1]["sampled"]
    low, high = s["interval"]
    expected = [
        "100.0%",
        f"[{low:.1%}, {high:.1%}]",
        "10",
        f"{s['return']:.2f}",
        f"{s['length']:.1f}",
        "0.0%",
        "100.0%",
    ]
    assert table_of(out)["expert"][:7] == expected and table_of(out)["expert"][-1] == "5"
    assert rows[0]["greedy"] is None and table_of(out)["random"][-1] == "-", "a random actor has no greedy action"


def test_table_of_all_runs(sft_runs, bases, capsys, monkeypatch):
    """`eval.py` on an SFT run: catches a run left out, and the ablation played with reflections."""
    options = [
        "--env",
        "corridor:Corridor",
        "--base",
        bases["gpt2"],
        "--runs",
        sft_runs,
        "--repeats",
        1,
        "--bf16",
        "off",
    ]
    run_script(evaluation, *options, monkeypatch=monkeypatch)
    sft = ["corridor-sft-s0 without reflection", "corridor-sft-s0 with reflection"]
    assert list(table_of(capsys.readouterr().out)) == ["random", "expert", *sft]


def test_base_is_taken_from_the_run(sft_runs, bases, capsys, monkeypatch):
    """Catches an evaluation on another base than the run was trained on, because --base was not repeated."""
    run_script(
        evaluation,
        "--env",
        "corridor:Corridor",
        "--base",
        bases["llama"],
        "--runs",
        sft_runs,
        "--repeats",
        1,
        "--bf16",
        "off",
        "--run",
        sft_runs / "corridor-sft-s0",
        monkeypatch=monkeypatch,
    )
    assert "corridor-sft-s0 with reflection" in capsys.readouterr().out


def test_a_run_is_evaluated_as_it_was_trained_but_for_what_is_given():
    """Catches `--games` that a run's own options silence, labels and reflection limits of the command line on
    another run's adapters."""
    config = {"env": "taxi", "base": "b", "labels": "words", "env_option": [["mode", "pickup"], ["horizon", 9]]}
    config |= {"max_reflection": 7, "seed": 3}
    given = argparse.Namespace(env="other", base="nano", labels="letters", env_option=[("mode", "full")], split="test")
    found = vars(evaluation.as_trained(given, config))
    assert dict(found.pop("env_option")) == {"mode": "full", "horizon": 9}
    assert found == {"env": "taxi", "base": "b", "labels": "words", "max_reflection": 7, "split": "test"}
    assert given.env_option == [("mode", "full")], "the next run would get this one's options"


def test_show_prints_episodes(sft_runs, bases, capsys, monkeypatch):
    """Catches a viewer that shows less than state, reflection, menu and reward."""
    run_script(
        evaluation,
        *tiny_options(bases["gpt2"], sft_runs)[:10],
        "--repeats",
        1,
        "--show",
        1,
        "--run",
        sft_runs / "corridor-sft-s0",
        monkeypatch=monkeypatch,
    )
    out = capsys.readouterr().out
    assert all(text in out for text in ("at ", "goal", "# Analyze:", "go left", "go right", "reward"))


@pytest.mark.extra
def test_plot(tmp_path, monkeypatch):
    """Catches a plot of nothing, lines without an evaluation that break it, and seeds that look like other methods."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    for name, success, last in (("-s0", 0.1, 6), ("-s1", 0.2, 4), ("-ppo-s0", 0.3, 6)):
        lines = [{"step": i, "episodes": 8 * i} | ({"valid_success": success} if i % 2 else {}) for i in range(1, last)]
        (tmp_path / f"corridor-rl{name}").mkdir()
        (tmp_path / f"corridor-rl{name}" / "config.json").write_text('{"env": "corridor:Corridor"}')
        (tmp_path / f"corridor-rl{name}" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_script(
        evaluation,
        "--env",
        "corridor:Corridor",
        "--runs",
        tmp_path,
        "--plot",
        tmp_path / "curves.png",
        monkeypatch=monkeypatch,
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    [axes] = drawn[0].axes
    ppo, mean, first, second = axes.lines[0], *axes.lines[2:]
    assert ppo.get_color() != mean.get_color() == first.get_color() == second.get_color()
    assert list(mean.get_xdata()) == [8, 24] and list(mean.get_ydata()) == pytest.approx([0.15, 0.15])
    assert [list(line.get_xdata()) for line in (first, second)] == [[8, 24, 40], [8, 24]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["corridor-rl-ppo, 1 seed", "corridor-rl, 2 seeds"]


def test_runs_are_found_by_their_environment(runs):
    """Catches a run with a name of its own (`--name my-run`) that `eval.py` and `reflect_rl.py` do not see."""
    mine = shutil.copytree(runs / "corridor-sft-s0", runs / "my-run")
    args = argparse.Namespace(env="corridor:Corridor", runs=runs)
    assert runs_of(args) == [runs / "corridor-sft-s0", mine]
    shutil.rmtree(runs / "corridor-sft-s0")
    assert newest_run(args) == mine
    assert not runs_of(argparse.Namespace(env="taxi", runs=runs))


def test_groups_are_reported_apart(capsys):
    """Catches groups that mix tasks, and a table that shows only the mean of all."""
    make = functools.partial(envs.make, "alfworld")
    args = types.SimpleNamespace(split="test", repeats=1)
    expert = evaluation.row("expert", evaluation.expert_actor, make, args)
    nobody = evaluation.row("random", evaluation.random_actor, make, args)
    types_ = {name.replace("_", " ") for name in envs.household()["sentences"]}
    assert set(expert["groups"]) == types_ | {"seen combination", "unseen combination"}
    assert {name: found["episodes"] for name, found in expert["groups"].items() if name in types_} == {
        name: 20 for name in types_
    }
    for table in (expert, nobody):
        found = [figures["success"] for name, figures in table["groups"].items() if name in types_]
        assert sum(found) / 6 == pytest.approx(table["sampled"]["success"])
    evaluation.print_table([nobody, expert])
    lines = [line for line in capsys.readouterr().out.splitlines() if "pick two obj and place" in line]
    assert [line.split("|")[1].strip() for line in lines] == ["random", "expert"] and "100.0%" in lines[1]


def test_groups_are_depth_and_origin():
    env = envs.make("autoexplore", generated=10)
    origins = ("written repository", "generated repository")
    assert {env.groups(task) for task in env.tasks("train")} == {
        (f"depth {depth}", origin) for depth in range(4) for origin in origins
    }
