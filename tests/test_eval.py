"""Intervals, summaries, the panel, baselines, tables, curves, and which runs are found and played how."""

import argparse
import json
import math
import random
import shutil
import sys

import pytest
from conftest import resolved, run_script, sft_folder, table_of, tiny_options, tiny_rl_options
from corridor import Corridor

import envs
import eval as evaluation
import plumbing.episodes
import plumbing.rows
import plumbing.runs
import reflect_rl
import rl
import sft
from envs import UserError
from plumbing.runs import runs_of
from reflect_rl import Episode, Step


@pytest.mark.parametrize("success, low, high", [(0, 0.0, 0.1611), (1, 1 - 0.1611, 1.0)])
def test_episodes_that_all_end_alike(success, low, high):
    """Catches an empty interval, and repeats of a start that make it narrower. 0 of 20 is in Newcombe, Statistics in
    Medicine 17 (1998), table I, method 3 (score interval without continuity correction)."""
    found = evaluation.interval(outcomes({task: [success] * 3 for task in range(20)}), Corridor())
    assert found == pytest.approx((low, high), abs=6e-5)


def test_only_seeds_of_one_kind_are_pooled():
    """Catches runs with other data that are taken for other seeds."""
    rows = []
    for more in ((), ("--seed", 1), ("--negatives", 0), ("--trajectories", 20)):
        args = resolved("--env", "taxi", *more, tables=(sft.DATA_OPTIONS, sft.OPTIONS))
        name = f"{sft.folder_of(args).name} with reflection"
        rows.append({"name": name, "sampled": [len(rows)], "greedy": [], "budget": [{}]})
    [found] = evaluation.pooled(rows)
    assert found["sampled"] == [0, 1] and found["name"] == rows[0]["name"].replace("-s0", "") + ", 2 seeds"


def test_a_seed_is_compared_with_the_same_seed(capsys):
    """Bugs: seeds paired in the order of their folders; the difference of runs with other seeds called paired."""
    rows = []
    for name, successes in (("a-s1", [1, 1]), ("a-s0", [0, 0]), ("b-s0", [0, 0]), ("b-s1", [1, 1]), ("c-s1", [0, 1]),
                            ("c-s2", [0, 1])):
        episodes = [episode([0.0], True, bool(success)) for success in successes]
        row = {"name": name, "split": "test", "env": Corridor(), "budget": [{}]}
        rows.append(row | {"sampled": [episodes], "greedy": [[]]})
    a, b, c = evaluation.pooled(rows)
    assert a["sampled"] == b["sampled"] == [rows[1]["sampled"][0], rows[0]["sampled"][0]] and c["seeds"] == [1, 2]
    evaluation.print_table(rows)
    differences = capsys.readouterr().out.split("minus")[1]
    assert "b, 2 seeds" in differences and "[+0.0%, +0.0%]" in differences and "c, 2 seeds" not in differences


def episode(rewards, terminated, success):
    found = Episode(0, None)
    found.steps = [Step("s", ("a",), log_probs=[0.0], action=0, reward=reward) for reward in rewards]
    found.terminated, found.truncated, found.success = terminated, not terminated, success
    return found


def test_summary_takes_the_environments_verdict():
    """Catches success read off the return (a failure may pay more), and running out of time counted as danger."""
    episodes = [episode([0.1, 0.1], True, True), episode([5.0], True, False)]
    episodes += [episode([-1.0] * 3, False, False), episode([0.0] * 4, False, True)]
    found = evaluation.summary(episodes)
    assert found == pytest.approx({"success": 0.5, "return": 2.2 / 4, "length": 10 / 4, "failed": 0.25})


class Watched(Corridor):
    """Notes with which options it is played."""

    played = []

    def reset(self, *, seed=None, options=None):
        Watched.played.append(options)
        return super().reset(seed=seed, options=options)


class Many(Watched):
    def tasks(self, split):
        return [[here, goal] for here in range(20) for goal in range(20) if here != goal]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("greedy", [True, False])
def test_the_panel_is_fixed(split, greedy):
    """Catches splits mixed up, training or curriculum options left on, one sampled episode counted three times, a panel
    that is new at each call, and of a large split the first tasks."""
    Watched.played, repeats = [], 1 if greedy else 3
    first = evaluation.evaluate(evaluation.random_actor, Watched, split, repeats=3, greedy=greedy)
    assert [e.task for e in first] == Corridor().tasks(split) * repeats
    assert Watched.played == [{"task": e.task} for e in first]
    again = evaluation.evaluate(evaluation.random_actor, Watched, split, repeats=3, greedy=greedy)
    assert list(map(vars, first)) == list(map(vars, again))
    if not greedy:
        ways = {tuple(step.action for step in e.steps) for e in first if e.task == first[0].task}
        assert len(ways) > 1 or len(first[0].steps) == 1
    random.seed(repeats)
    found = [e.task for e in evaluation.evaluate(evaluation.random_actor, lambda: Many(20), split, greedy=True)]
    random.seed(7)
    panel = [e.task for e in evaluation.evaluate(evaluation.expert_actor, lambda: Many(20), split, greedy=True)]
    assert panel == found and len(set(map(tuple, found))) == 120 and found != Many().tasks(split)[:120]
    with pytest.raises(UserError, match=f"{split} split has no tasks"):
        evaluation.evaluate(evaluation.random_actor, type("Empty", (Corridor,), {"tasks": lambda *_: []}), split)


def test_baselines():
    """Catches an expert that is sampled, and a random actor that is not uniform."""
    assert all(e.success for e in evaluation.evaluate(evaluation.expert_actor, Corridor, "test"))
    episodes = evaluation.evaluate(evaluation.random_actor, Corridor, "test", repeats=200)
    steps = [step for e in episodes for step in e.steps]
    right = sum(step.action for step in steps) / len(steps)
    assert abs(right - 0.5) < 5 * 0.5 / math.sqrt(len(steps)), "five standard errors off: one in two million by chance"


def test_table_shows_the_figures(capsys):
    """Catches columns in another order than their headings: budget, success, interval, n, return, length, failed;
    greedy."""
    args = resolved("--env", "corridor:Corridor", "--repeats", 2, tables=(evaluation.OPTIONS,))
    rows = evaluation.baseline_rows(args)
    evaluation.print_table(rows)
    out = capsys.readouterr().out
    assert "test split" in out and "over 5 clusters" in out and list(table_of(out)) == ["random", "expert"]
    figures = evaluation.summary(rows[1]["sampled"][0])
    middle = [f"{figures['return']:.2f}", f"{figures['length']:.1f}", "0.0%"]
    low, high = 5 / (5 + 1.96**2), 1.0  # Wilson's of 5 of the 5 clusters: repeats of a start say nothing new
    interval = f"[{low:.1%}, {high:.1%}]"
    assert table_of(out)["expert"] == ["0", "0", "0", "100.0%", interval, "10", *middle, "100.0%", interval, "5"]
    assert table_of(out)["random"][-3:] == ["-"] * 3, "a random actor has no greedy action"


def test_budgets_add_up_and_are_dashes_where_unknown(tmp_path):
    """Catches records counted once a player, updates of one player only, and a run of before that seems to be free."""
    for name, numbers in {"reflect": (50, 7), "policy": (40, 5, 16)}.items():
        (tmp_path / name).mkdir()
        plumbing.runs.write_budget(tmp_path / name, *numbers)
    both = [plumbing.runs.budget_of([tmp_path / "reflect", tmp_path / "policy"]), plumbing.runs.budget_of([])]
    assert both == [{"records": 50, "updates": 12, "episodes": 16}, {"records": 0, "updates": 0, "episodes": 0}]
    assert evaluation.budget_cells(both) == ["25", "6", "8"], "the mean of the seeds"
    for damage in (lambda path: path.write_text('{"records": 5'), lambda path: path.unlink()):
        damage(tmp_path / "policy" / "budget.json")
        assert plumbing.runs.budget_of([tmp_path / "reflect", tmp_path / "policy"]) == {}
    assert evaluation.budget_cells([both[0], {}]) == ["-"] * 3


@pytest.mark.parametrize("name", ["corridor:Corridor", "alfworld"])
def test_rows_of_a_file_are_those_that_were_played(name, tmp_path, capsys, monkeypatch):
    """Catches a task that becomes another one, a seed, a verdict or a budget that is lost: rates, intervals, groups and
    differences must be the same to the last digit."""
    monkeypatch.setattr(evaluation, "PANEL", 40)
    rows = []
    for seed in (0, 1):
        monkeypatch.setattr(evaluation, "PANEL_SEED", 1000 * seed)
        args = resolved("--env", name, "--repeats", 2, tables=(evaluation.OPTIONS,))
        for row, kind in zip(evaluation.baseline_rows(args), ("bad", "good"), strict=True):
            budget = {"records": 7, "updates": seed, "episodes": 9} if kind == "good" else {}
            rows.append(row | {"name": f"{kind}-s{seed}", "budget": [budget], "curve": [[8, 0.5]]})
    rows += evaluation.pooled(rows)
    plumbing.rows.write_rows(rows, tmp_path / "rows.jsonl")
    read = plumbing.rows.read_rows(tmp_path / "rows.jsonl", envs.make(name))
    tables = []
    for some in (rows, read):
        evaluation.print_table(some)
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "good, 2 seeds" in tables[0] and "minus" in tables[0]
    for row, other in zip(rows, read, strict=True):
        assert row["curve"] == other["curve"] and row["split"] == other["split"]
        for e, again in zip(row["sampled"][0], other["sampled"][0], strict=True):
            assert (e.task, e.success, e.terminated) == (again.task, again.success, again.terminated)


def test_groups_are_reported_apart(capsys):
    """Catches groups that mix tasks, and a table that shows only the mean of all."""
    rows = evaluation.baseline_rows(resolved("--env", "alfworld", "--repeats", 1, tables=(evaluation.OPTIONS,)))
    evaluation.print_table(rows)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "pick two obj and place" in line]
    of_this_kind = [e for e in rows[0]["sampled"][0] if "pick two obj and place" in rows[0]["env"].groups(e.task)]
    success = evaluation.summary(of_this_kind)["success"]
    assert [[cell.strip() for cell in (line[1], line[3], line[5])] for line in lines] == [
        ["random", f"{success:.1%}", "20"], ["expert", "100.0%", "20"],
    ]


def outcomes(*seeds):
    """Episodes of Corridor tasks, a list a seed: `{task: [successes]}`."""
    runs = []
    for seed in seeds:
        runs.append([])
        for task, successes in seed.items():
            for success in successes:
                runs[-1].append(Episode([task, 0], success=bool(success)))
    return runs


def test_intervals_are_over_clusters_and_seeds():
    """Catches repeats of one start that make an interval narrower, and seeds that are left out."""
    rng = random.Random(0)
    once = {task: [rng.random() < 0.3] for task in range(200)}
    low, high = evaluation.interval(outcomes(once), Corridor())
    p = sum(sum(row) for row in once.values()) / 200
    half = 1.96 * math.sqrt(p * (1 - p) / 200)  # episodes of their own: the normal approximation of a binomial
    assert (low, high) == pytest.approx((p - half, p + half), abs=0.01)
    often = {task: row * 9 for task, row in once.items()}
    assert evaluation.interval(outcomes(often), Corridor()) == pytest.approx((low, high), abs=1e-9)
    same, worse = outcomes(once, once), outcomes(once, {task: [0] for task in once})
    assert evaluation.interval(same, Corridor()) == pytest.approx((low, high), abs=0.01)
    assert evaluation.interval(worse, Corridor())[0] == 0.0, "a seed at 0 may be drawn twice"


def test_differences_are_paired():
    """Catches two intervals laid side by side: of two policies that fail at the same hard starts, the one that also
    solves a few more is better for sure."""
    one, other = ({task: [task < limit] for task in range(100)} for limit in (60, 50))
    gap, (low, high) = evaluation.difference(outcomes(one), outcomes(other), Corridor())
    assert gap == pytest.approx(0.1) and 0.03 < low < 0.1 < high < 0.17
    assert evaluation.interval(outcomes(one), Corridor())[0] < evaluation.interval(outcomes(other), Corridor())[1]
    assert evaluation.difference(outcomes(one), outcomes(one), Corridor()) == (0.0, (0.0, 0.0))


def test_what_was_played_is_not_played_again(runs, bases, capsys, monkeypatch):
    """Catches a table that plays again, episodes of other weights, of another panel, of another game or half written
    that are taken for these, seeds that are not pooled."""
    for seed in (0, 1):
        options = [*tiny_rl_options(bases["gpt2"], runs), "--seed", seed, "--eval-every", 0]
        run_script(rl, *options, monkeypatch=monkeypatch)
    first = capsys.readouterr().out
    played, real = [], evaluation.play
    monkeypatch.setattr(evaluation, "play", lambda *args, **more: played.append(args[0]) or real(*args, **more))

    def again(*more):
        played.clear()
        run_script(evaluation, *eval_options(runs), *more, monkeypatch=monkeypatch)
        out = capsys.readouterr().out
        return out, [actor for actor in played if isinstance(actor, reflect_rl.Players)]

    out, players = again()
    assert players == [] or len(players) == 2  # the session's SFT run has an ablation that no table has shown yet
    out, players = again()
    assert not players and table_of(first)["corridor-rl-s1"] == table_of(out)["corridor-rl-s1"]
    assert "corridor-rl, 2 seeds" in table_of(out) and "minus" in out
    folder = runs / "corridor-rl-s0"
    assert len(again("--repeats", 2)[1]) >= 2 and len(again("--split", "valid")[1]) >= 2
    again()
    assert not again("--repeats", 2)[1], "each panel has a file of its own"
    files = list((folder / "episodes").glob("test-sampled-*"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[:-30])
    assert len(again()[1]) == 1 and not again()[1]
    with monkeypatch.context() as context:  # as if the environment's module had been edited
        (folder / "edited.py").write_text("class Corridor: ...")
        context.setattr(plumbing.episodes.inspect, "getsourcefile", lambda step: folder / "edited.py")
        assert len(again()[1]) >= 2
    for module in (envs, reflect_rl):  # as if our own had been
        with monkeypatch.context() as context:
            context.setattr(module, "__file__", str(folder / "edited.py"))
            assert len(again()[1]) >= 2
    again()
    weights = folder / "policy" / "adapter_model.safetensors"
    shutil.copy(runs / "corridor-rl-s1" / "policy" / "adapter_model.safetensors", weights)
    assert len(again()[1]) == 2


# ---------------------------------------------------------------------------------------------------------
# Runs


def eval_options(runs, *more):
    return ["--env", "corridor:Corridor", "--runs", runs, "--repeats", 1, "--device", "cpu", *more]


def test_table_of_all_runs(runs, bases, capsys, monkeypatch):
    """Catches a run left out, the ablation played with reflections, and a run that is damaged, still in training, or
    on other tasks, that hides the others; each of them is named. Also a run of another module with the same class, a
    base that plays with adapters, and a file (`--json`) of other rows than the table's."""
    run_script(rl, *tiny_rl_options(bases["gpt2"], runs), "--eval-every", 0, monkeypatch=monkeypatch)
    good = runs / "corridor-rl-s0"
    for kept in runs.glob("**/episodes"):  # played again here
        shutil.rmtree(kept)
    for name in ("damaged", "elsewhere", "training", "another-env", "longer", "NaN"):
        shutil.copytree(good, runs / name)
    config = json.loads((good / "config.json").read_text())
    (runs / "damaged" / "config.json").write_text('{"env": "corridor:Corr')
    (runs / "elsewhere" / "config.json").write_text(json.dumps(config | {"env": "another:Corridor"}))
    (runs / "another-env" / "config.json").write_text(json.dumps(config | {"env": "taxi"}))
    (runs / "longer" / "config.json").write_text(json.dumps(config | {"env_option": [["length", 9]]}))
    shutil.rmtree(runs / "training" / "policy")
    (runs / "NaN" / "policy" / "adapter_model.safetensors").write_bytes(b"")
    capsys.readouterr()
    loaded, load = [], evaluation.load_players
    monkeypatch.setattr(evaluation, "load_players", lambda args, named: loaded.append(named) or load(args, named))
    run_script(evaluation, *eval_options(runs), "--untuned", "--json", runs / "rows", monkeypatch=monkeypatch)
    assert loaded[:2] == [{}, {"policy": sft_folder(runs) / "plain"}], "the ablation plays without reflections"
    assert loaded[2] == {name: sft_folder(runs) / name for name in ("reflect", "policy")}
    out, sft = capsys.readouterr().out, sft_folder(runs).name
    names = ["random", "expert", "untuned base", f"{sft} without reflection", f"{sft} with reflection", good.name]
    assert list(table_of(out)) == names
    evaluation.print_table(plumbing.rows.read_rows(runs / "rows", Corridor()))
    assert table_of(capsys.readouterr().out) == table_of(out)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    named = ("damaged", "longer", "training", "NaN")
    assert len(notes) == 4 and all(any(str(runs / name) in note for note in notes) for name in named)
    assert runs_of(argparse.Namespace(env="taxi", runs=runs)) == [runs / "another-env"]


def test_a_run_is_played_as_it_was_trained(runs, bases, capsys, monkeypatch):
    """Catches an evaluation on another base than the run's, a viewer that shows nothing, a run without policy that is
    taken for the newest one."""
    folder = sft_folder(runs)
    options = ["--base", bases["llama"], "--labels", "words"]
    run_script(evaluation, *eval_options(runs, *options, "--run", folder), monkeypatch=monkeypatch)
    assert f"{folder.name} with reflection" in table_of(capsys.readouterr().out)
    shutil.copytree(folder, runs / "newest", ignore=lambda *_: ["policy"])
    for more in ([], ["--run", folder, "--task", 4, "--greedy"]):
        run_script(reflect_rl, *tiny_options(*options[1:2], runs)[:8], *more, monkeypatch=monkeypatch)
        out = capsys.readouterr().out
        assert all(text in out for text in ("at ", "goal", "# Analyze:", "go left", "go right", "reward", "after"))
    with pytest.raises(UserError, match="the test split has 5 tasks"):
        run_script(reflect_rl, *tiny_options(*options[1:2], runs)[:8], "--task", 5, monkeypatch=monkeypatch)
    shutil.rmtree(folder / "plain")
    (folder / "reflect").rename(folder / "gone")
    with pytest.raises(UserError, match="holds no reflector yet"):
        run_script(evaluation, *eval_options(runs, "--run", folder), monkeypatch=monkeypatch)
    (folder / "gone").rename(folder / "reflect")
    shutil.rmtree(folder / "policy")
    with pytest.raises(UserError, match="holds no policy yet"):
        run_script(evaluation, *eval_options(runs, "--run", folder), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="no run of corridor:Corridor in .* can play"):
        run_script(reflect_rl, *tiny_options(*options[1:2], runs)[:8], monkeypatch=monkeypatch)


def test_what_is_given_wins_over_the_run(tmp_path):
    """Catches `--env-option` that a run's own options silence, labels and reflection limit of the command line on
    another run's adapters."""
    config = {"env": "taxi", "base": "b", "labels": "words", "env_option": [["mode", "pickup"], ["horizon", 9]]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_reflection": 7, "seed": 3}))
    given = argparse.Namespace(env="taxi", base="nano", labels="letters", env_option=[("mode", "full")], split="test")
    found = vars(plumbing.runs.as_trained(given, tmp_path))
    assert dict(found.pop("env_option")) == {"mode": "full", "horizon": 9}
    assert found == {"env": "taxi", "base": "b", "labels": "words", "max_reflection": 7, "split": "test"}
    assert given.env_option == [("mode", "full")], "the next run would get this one's options"
    games = {"env_option": [["games", "somewhere"]], "max_reflection": 7}
    (tmp_path / "config.json").write_text(json.dumps(config | games))
    with pytest.raises(UserError, match="played real games: say which"):  # TextWorld evaluates their text
        plumbing.runs.as_trained(given, tmp_path)
    given.env_option = [("games", "mine")]
    assert dict(plumbing.runs.as_trained(given, tmp_path).env_option) == {"games": "mine"}


@pytest.mark.parametrize("module", [evaluation, reflect_rl])
@pytest.mark.parametrize("name", ["os:system", "bomb:Corridor"])
def test_a_run_from_elsewhere_executes_nothing(name, module, runs, tmp_path, monkeypatch):
    """Catches a config.json that names a function or a module, which is then called or imported."""
    (tmp_path / "bomb.py").write_text("raise SystemError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("os.system", lambda *args: pytest.fail("called"))
    config = json.loads((sft_folder(runs) / "config.json").read_text())
    (sft_folder(runs) / "config.json").write_text(json.dumps(config | {"env": name, "env_option": [["command", "ls"]]}))
    for env in ("taxi", "corridor:Corridor"):
        options = ["--env", env, "--runs", runs, "--device", "cpu", "--run", sft_folder(runs)]
        with pytest.raises(UserError, match=f"plays {name}: say so with --env"):
            run_script(module, *options, monkeypatch=monkeypatch)
    with pytest.raises((UserError, SystemError), match="not a subclass of envs.Env|imported"):
        run_script(module, "--env", name, "--run", sft_folder(runs), monkeypatch=monkeypatch)


@pytest.mark.extra
def test_plot(tmp_path, bases, monkeypatch):
    """Catches a plot of nothing, lines without an evaluation that break it, and seeds that look like other methods."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    options = eval_options(tmp_path, "--plot", tmp_path / "curves.png")
    with pytest.raises(UserError, match="no run of corridor"):
        run_script(evaluation, *options, monkeypatch=monkeypatch)
    config = vars(resolved(*tiny_options(bases["gpt2"], tmp_path)[:2]))
    for name, success, last in (("-s0", 0.1, 6), ("-s1", 0.2, 4), ("-ppo-s0", 0.3, 6)):
        lines = [{"step": i, "episodes": 8 * i} | ({"valid_success": success} if i % 2 else {}) for i in range(1, last)]
        run = tmp_path / f"corridor-rl{name}"
        run.mkdir()
        (run / "config.json").write_text(json.dumps(config))
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_script(evaluation, *options, monkeypatch=monkeypatch)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["corridor rl", "corridor rl ppo"]  # the lowest first
    assert all(text.get_annotation_clip() is False for text in axes.texts), "a name above 1 would be left out"
    assert [list(line.get_xdata()) for line in axes.lines] == [[8, 24], [8, 24, 40]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.15, 0.15])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1, 0.2)), "from the worst seed to the best"
    with pytest.raises(UserError, match="curves.foo: Format 'foo' is not supported"):
        run_script(evaluation, *options[:-1], tmp_path / "curves.foo", monkeypatch=monkeypatch)


def test_a_run_from_elsewhere_names_no_game_files(tmp_path):
    """TextWorld evaluates what stands in a game file: it must come from the command line."""
    config = {"env": "alfworld", "base": "nano", "labels": "words", "max_reflection": 9, "env_option": [["games", "g"]]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = argparse.Namespace(env="alfworld", env_option=[])
    with pytest.raises(UserError, match="--env-option games=PATH"):
        plumbing.runs.as_trained(args, tmp_path)
    assert plumbing.runs.as_trained(argparse.Namespace(env="alfworld", env_option=[("games", "mine")]), tmp_path)


def test_a_policy_that_reads_reflections_does_not_play_without(runs):
    """Catches the row "with reflection" of an SFT run whose reflector is missing."""
    folder = sft_folder(runs)
    shutil.rmtree(folder / "reflect")
    with pytest.raises(UserError, match="no reflector"):
        plumbing.runs.adapters_of(folder)
