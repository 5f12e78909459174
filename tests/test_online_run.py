"""A run of the online stage that is left alone: resume, kills, signals, lock, full disk, guards, warnings."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from online_helpers import (
    Walk,
    assert_equal_runs,
    last_state,
    make_start,
    read_log,
    rl_args,
    run_options,
    run_process,
    start_process,
)

import reflect_rl
import rl
from envs import UserError

ALGORITHMS = {
    "reinforce": ["--algo", "reinforce", "--replay", 3],
    "rloo": ["--algo", "rloo"],
    "grpo": ["--algo", "grpo", "--kl", 0.1],
    "ppo": ["--algo", "ppo", "--replay", 3, "--warmup", 4],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`(base, adapters)` to start from."""
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def options(start, tmp_path):
    """`options(*more)`: the command line of a run in this test's folder."""
    return lambda *more, runs="runs": run_options(start[0], tmp_path / runs, *more)


def train(options, start):
    return rl.train(rl_args(*options), start[1])


class Crash(BaseException):
    """Stands in for a kill in this process: no `except` of the project may catch it."""


def crash_at(step, monkeypatch):
    """Die after the log line of an update, before its checkpoint."""
    real = rl.report

    def dying(run, progress, *rest):
        real(run, progress, *rest)
        if progress["step"] == step:
            raise Crash

    monkeypatch.setattr(rl, "report", dying)


# ---------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_resumed_run_equals_the_uninterrupted_one(algo, start, options, monkeypatch):
    """Six updates, the stage changes after three; the other run dies in updates 4 and 6 and resumes at 2 and 4.

    Bugs: Adam's moments, the critic, the replay buffer, the stage, the memo or a counter that begins anew.
    """
    whole = train(options(*ALGORITHMS[algo]), start)
    cut = options(*ALGORITHMS[algo], runs="cut")
    for attempt, step in enumerate((4, 6)):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_at(step, patch)
            train([*cut, *["--resume"] * attempt], start)
    resumed = train([*cut, "--resume"], start)
    assert_equal_runs(whole, resumed)
    stages = [line["stage"] for line in read_log(whole)]
    assert stages == ["near"] * 3 + ["far"] * 3
    if "--replay" in ALGORITHMS[algo]:
        assert last_state(whole)["buffer"], "no success was ever kept: the buffer was not tested"


def test_a_resume_before_the_first_checkpoint_begins_anew(start, options, monkeypatch):
    """Bug: the evaluation before the first update is not made again, and what it had reflected on is not known."""
    more = ["--updates", 4, "--eval-every", 2]
    whole, cut = train(options(*more), start), options(*more, runs="cut")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(1, patch)
        train(cut, start)
    resumed = train([*cut, "--resume"], start)
    assert_equal_runs(whole, resumed)
    steps = [[json.loads(line)["step"] for line in (run / "log.jsonl").open()] for run in (whole, resumed)]
    assert steps == [[0, 1, 2, 3, 4]] * 2


def test_a_resume_may_save_and_show_otherwise(start, options):
    """Bug: an option that changes no number keeps a run from going on."""
    run = train(options("--updates", 2), start)
    other = ["--save-every", 1, "--show-every", 1, "--keep", 1, "--micro-batch", 8]
    assert train([*options("--updates", 2), "--resume", *other], start) == run


def test_the_buffer_is_of_this_stage_only(start, options):
    """Bug: successes of an easier stage replayed in a later one, or not cleared where the stage changed at a resume."""
    run = train(options("--replay", 3, "--keep", 3, "--save-every", 1, "--updates", 4), start)
    two, three, four = (torch.load(path / "state.pt", weights_only=True) for path in reflect_rl.checkpoints(run))
    numbers = {json.dumps(step["state"]) for episode in two["buffer"] for step in episode["steps"][:1]}
    assert two["stage"] == "near" and three["stage"] == four["stage"] == "far" and numbers
    successes = round(sum(line["success"] for line in read_log(run)[2:]) * 8)
    assert len(four["buffer"]) == successes


def test_keep_last(start, options):
    """Bug: every checkpoint stays and fills the disk, or the newest is removed."""
    run = train(options("--keep", 3, "--save-every", 1), start)
    assert [path.name for path in reflect_rl.checkpoints(run)] == ["step-000004", "step-000005", "step-000006"]


def test_a_finished_run_resumes_to_itself(start, options):
    """Bug: `--resume` of a finished run, as `eval.py --reproduce` does it, plays on or rewrites its files."""
    run = train(options(), start)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("adapter_*")}
    train([*options(), "--resume"], start)
    assert before and {path: path.stat().st_mtime_ns for path in before} == before


def test_half_written_final_adapters_do_not_stop_a_resume(start, options):
    """A kill in the last save. Bug: resume loads the run's own broken adapters instead of the checkpoint's."""
    run = train(options(), start)
    whole = shutil.copytree(run, run.parent / "whole")
    (run / "policy" / "adapter_config.json").unlink()
    (run / "reflect" / "adapter_model.safetensors").write_bytes(b"half")
    train([*options(), "--resume"], start)
    assert_equal_runs(whole, run)


# ---------------------------------------------------------------------------------------------------------
# Kills


def done(runs):
    return (runs / "run" / "policy" / "adapter_config.json").exists()


def kill_often(kills, start, tmp_path, seed):
    """Kill runs at random moments and resume each, until `kills` have hit; all of them must end equal to the whole.

    Every other kill is timed by the clock; the others hit a random file operation, where a save is most fragile.
    """
    rng, more = random.Random(seed), ["--algo", "ppo", "--replay", 3, "--save-every", 1]
    began = time.monotonic()
    run_process(run_options(start[0], tmp_path / "whole", *more), start[1], tmp_path / "out")
    duration, hits, runs = time.monotonic() - began, 0, [tmp_path / "cut0"]
    while hits < kills or not done(runs[-1]):
        if done(runs[-1]):
            runs.append(tmp_path / f"cut{len(runs)}")
        options, dying = run_options(start[0], runs[-1], *more, "--resume"), hits < kills
        by_file = rng.randrange(1, 60) if dying and hits % 2 else 0
        process = start_process(options, start[1], tmp_path / "out", die_at_file_operation=by_file)
        process.join(rng.uniform(0, duration) if dying and not by_file else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), (tmp_path / "out").read_text()
        hits += process.exitcode == -9
    for folder in runs:
        assert_equal_runs(tmp_path / "whole" / "run", folder / "run")


def test_three_kills(start, tmp_path):
    """Bug: a kill leaves something that a resume takes for whole, or that changes what the resumed run does."""
    kill_often(3, start, tmp_path, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills(seed, start, tmp_path):
    """The same, until something rare is hit as well."""
    kill_often(20, start, tmp_path, seed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(number, start, options, tmp_path):
    """Bug: what was played since the last checkpoint is lost, or a traceback; the resumed run is another one."""
    more = ["--save-every", 100, "--updates", 8]
    process = start_process(options(*more), start[1], tmp_path / "out")
    run = tmp_path / "runs" / "run"
    while process.is_alive() and not (run / "log.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    text = (tmp_path / "out").read_text()
    assert process.exitcode == 1 and "--resume" in text and "Traceback" not in text, text
    [checkpoint] = reflect_rl.checkpoints(run)
    assert int(checkpoint.name[5:]) == len(read_log(run)) < 8
    run_process([*options(*more), "--resume"], start[1], tmp_path / "out")
    run_process(options(*more, runs="whole"), start[1], tmp_path / "out")
    assert_equal_runs(tmp_path / "whole" / "run", run)


def test_a_signal_in_the_last_save_still_stops(start, options, monkeypatch):
    """Bug: it is forgotten, and minutes of evaluation follow."""
    real = rl.save_checkpoint

    def signalled(*rest, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*rest, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="is trained"):
        patch.setattr(rl, "save_checkpoint", signalled)
        train(options("--updates", 1), start)
    run = train([*options("--updates", 1), "--resume"], start)
    assert reflect_rl.find_adapters(run)["policy"] == run / "policy"


def test_a_late_signal_to_another_rank_is_none_of_its_business(start, options, monkeypatch):
    """Bug: it leaves with a failure, for which torchrun kills rank 0 in the last save."""
    real = rl.agreed
    monkeypatch.setattr(rl, "agreed", lambda stopping: (real(stopping), os.kill(os.getpid(), signal.SIGTERM))[0])
    monkeypatch.setattr(rl, "rank", lambda: 1)  # of one: it writes nothing, and leaves out an episode
    assert train(options("--updates", 1, runs="other"), start).parent.name == "other"


@pytest.mark.extra
def test_tensorboard_gets_every_figure_and_takes_back_what_was_not_saved(start, options, tmp_path):
    """Bug: a kill loses what was in a buffer, or a resumed run draws the updates after its checkpoint twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = options("--tensorboard", "--updates", 12, "--save-every", 6, "--eval-every", 0)
    run = tmp_path / "runs" / "run"
    process = start_process(more, start[1], tmp_path / "out")
    while process.is_alive() and not ((run / "log.jsonl").exists() and len(read_log(run)) >= 8):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9

    def drawn(key):
        events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars(key)
        return [(event.step, pytest.approx(event.value)) for event in events]

    def logged(key):
        return [(line["episodes"], line[key]) for line in read_log(run)]

    assert drawn("success")[:7] == logged("success")[:7]
    time.sleep(1.1)  # event files are read in the order of their names, which count seconds
    train([*more, "--resume"], start)
    for key in ("success", "entropy", "grad_norm"):
        assert drawn(key) == logged(key)


def test_a_second_process_is_refused(start, options, tmp_path):
    """Bug: two processes write one run. The lock must go with its holder, or a killed run could not be resumed."""
    run = tmp_path / "runs" / "run"
    with reflect_rl.lock_run(run):
        text = run_process([*options(), "--resume"], start[1], tmp_path / "out", code=2)
    assert text.startswith("error: another process") and text.count("\n") == 1, text
    assert [path.name for path in run.iterdir()] == ["lock"], "the second process wrote something"
    train(options("--updates", 1), start)


# ---------------------------------------------------------------------------------------------------------
# Full disk


@pytest.mark.parametrize("file", ["log.jsonl", "adapter_model.safetensors", "state.pt"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(file, start, options, tmp_path, monkeypatch):
    """The kernel refuses to let any file grow beyond a limit that stops just this one. Bug: a traceback, a broken or
    missing checkpoint, a half line that spoils the log."""
    whole = train(options("--algo", "ppo", runs="whole"), start)
    cut = options("--algo", "ppo")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(3, patch)
        train(cut, start)
    run = tmp_path / "runs" / "run"
    largest = max(path.stat().st_size for path in run.rglob(file))
    limit = sum(len(line) for line in (run / "log.jsonl").open() if json.loads(line)["step"] <= 2) + 50
    limit = limit if file == "log.jsonl" else largest - 500
    text = run_process([*cut, "--resume"], start[1], tmp_path / "out", code=2, file_limit=limit)
    assert text.splitlines()[-1].startswith("error: cannot") and "Traceback" not in text, text
    assert [path.name for path in run.glob("*step-*")] == ["step-000002"]
    train([*cut, "--resume"], start)
    assert_equal_runs(whole, run)


def test_a_disk_that_is_full_at_the_very_end(start, options, monkeypatch):
    """Bug: a traceback after hours, where all but the copy of the final adapters is safe."""
    real = rl.save_adapter

    def full(model, name, folder):
        if folder.parent.name == "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(model, name, folder)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left.*checkpoint is good"):
        patch.setattr(rl, "save_adapter", full)
        train(options("--updates", 2), start)
    run = train([*options("--updates", 2), "--resume"], start)
    assert reflect_rl.find_adapters(run)["policy"] == run / "policy"


# ---------------------------------------------------------------------------------------------------------
# Guards and warnings


def spoil_updates(numbers, monkeypatch):
    """Make the loss of these updates (counted from 0 in this process) NaN."""
    real, count = rl.policy_gradient_loss, iter(range(1000))
    monkeypatch.setattr(
        rl, "policy_gradient_loss", lambda *rest: real(*rest) * (float("nan") if next(count) in numbers else 1.0)
    )


def policy_of(folder):
    return (folder / "policy" / "adapter_model.safetensors").read_bytes()


def test_an_update_that_is_not_finite_is_skipped_and_counted(start, options, monkeypatch):
    """Bug: NaN weights, or Adam moments that are NaN for ever."""
    spoil_updates({1}, monkeypatch)
    run = train(options("--save-every", 1, "--keep", 6, "--updates", 3), start)
    one, two, three = reflect_rl.checkpoints(run)
    assert policy_of(one) == policy_of(two) != policy_of(three)
    assert [line["skipped"] for line in read_log(run)] == [0, 1, 1]


def test_five_in_a_row_stop_the_run(start, options, monkeypatch):
    """Also where a resume lies between. Bug: a run that does nothing for days; single bad updates that add up."""
    more = options("--save-every", 1, "--updates", 12, "--eval-every", 0)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        spoil_updates({1, 4, 5, 6}, patch)  # the last three in a row are updates 5, 6 and 7
        crash_at(8, patch)
        patch.setattr(rl, "save_checkpoint", save_until(7, rl.save_checkpoint))
        train(more, start)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="five gradients in a row"):
        spoil_updates({0, 1}, patch)
        train([*more, "--resume"], start)


def save_until(last, real):
    return lambda run, step, *rest, **more: real(run, step, *rest, **more) if step <= last else None


def test_warnings(start, options, capsys, monkeypatch):
    """Bug: a run that cannot learn, silently; or one that cries all the time."""
    train(options("--updates", 1, runs="healthy"), start)
    healthy = capsys.readouterr().out
    assert "same return" not in healthy and "exploring" not in healthy
    real_step, real_score = Walk.step, reflect_rl.Players.score

    def worthless(env, action):
        state, _, *rest = real_step(env, action)
        return state, 0.0, *rest

    monkeypatch.setattr(Walk, "step", worthless)
    monkeypatch.setattr(reflect_rl.Players, "score", lambda self, x, menus: real_score(self, x * 1e4, menus))
    train(options("--updates", 1, runs="ill"), start)
    ill = capsys.readouterr().out
    assert "every episode had the same return" in ill and "the policy has stopped exploring" in ill


def test_what_is_logged(start, options):
    """Bug: a figure that the README explains is not there. Danger, length and success are checked by hand."""
    played, real = [], rl.play_together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "play_together", lambda *rest: played.append(real(*rest)) or played[-1])
        run = train(options("--algo", "ppo", "--updates", 1, "--kl", 0.1), start)
    [line], [episodes] = read_log(run, ignore=()), played
    expected = {"step", "episodes", "stage", "return", "success", "length", "failed", "entropy", "approx_kl", "kl_sft"}
    expected |= {"clip_fraction", "grad_norm", "skipped", "explained_variance", "cache_hits", "cut_reflections"}
    assert set(line) == expected | {"episodes_per_s", "valid_success", "valid_episodes"}
    assert line["success"] == sum(e.steps[-1].reward == 1.0 for e in episodes) / 8
    assert line["failed"] == sum(e.steps[-1].reward == -0.5 for e in episodes) / 8
    assert line["length"] == sum(len(e.steps) for e in episodes) / 8
    assert line["return"] == pytest.approx(sum(s.reward for e in episodes for s in e.steps) / 8)
