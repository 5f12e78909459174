"""The players that come with the project play at once, and can be watched."""

import contextlib
import json
import os
import pty
import shutil
import threading

import pytest
from conftest import ROOT, run_script, table_of

import eval as evaluation
import plumbing.runs
import plumbing.show
import reflect_rl
from envs import UserError
from reflect_rl import Step

SHIPPED = sorted(path.parent for path in (ROOT / "models" / "nano" / "adapters").glob("*/config.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_are_runs_of_any_machine(folder):
    """Catches an adapter too large for a clone, one without its budget, and a path of the machine that made it."""
    config = plumbing.runs.read_config(folder)
    assert (config["env"], config["base"]) == (folder.name, "nano") and "runs" not in config
    adapters = plumbing.runs.adapters_of(folder)
    assert set(adapters) == {"reflect", "policy"} and plumbing.runs.budget_of(adapters.values())["episodes"] > 0
    for adapter in adapters.values():
        told = json.loads((adapter / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == "models/nano"
        assert (adapter / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_who_plays(tmp_path, bases, monkeypatch, capsys):
    """Catches a fresh clone that cannot play, shipped players before the user's own or on another base."""
    run_script(reflect_rl, "--env", "taxi", "--runs", tmp_path, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith(f"no run of taxi in {tmp_path}: the shipped players play") and " steps, return " in out
    with pytest.raises(UserError, match="no run of taxi in .* can play"):
        run_script(reflect_rl, "--env", "taxi", "--runs", tmp_path, "--base", bases["gpt2"], monkeypatch=monkeypatch)
    mine = shutil.copytree(ROOT / "models" / "nano" / "adapters" / "taxi", tmp_path / "mine")
    run_script(reflect_rl, "--env", "taxi", "--runs", tmp_path, monkeypatch=monkeypatch)
    assert "shipped" not in capsys.readouterr().out

    monkeypatch.setattr(evaluation, "PANEL", 6)
    run_script(evaluation, "--run", mine, "--repeats", 1, monkeypatch=monkeypatch)
    *budget, success = table_of(capsys.readouterr().out)["mine"][:4]
    assert budget == list(map(str, plumbing.runs.budget_of([mine / "reflect", mine / "policy"]).values()))
    assert float(success.rstrip("%")) > 60


# ---------------------------------------------------------------------------------------------------------
# Watching


def two_steps():
    episode = reflect_rl.Episode(0, state="at the end", success=True)
    for number in (1, 2):
        step = Step(f"at {number}", ("go", "stop"), "Go on.", log_probs=[-0.6931472, -0.6931472], action=1, reward=0.5)
        episode.steps.append(step)
    return episode


@contextlib.contextmanager
def terminal(monkeypatch):
    """A pseudo terminal in place of stdout; a list whose first item is what it showed, once the block is left."""
    master, slave = pty.openpty()
    shown, pieces = [], []

    def read():
        with contextlib.suppress(OSError):  # the other end was closed
            while piece := os.read(master, 4096):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        yield shown
    reader.join()
    os.close(master)
    shown.append(b"".join(pieces).decode().replace("\r\n", "\n"))


def test_watching_on_a_terminal(monkeypatch):
    """Catches frames below each other, a missing last state, bars that are not the probabilities, a hidden cursor."""
    monkeypatch.setattr(plumbing.show, "WATCH_PAUSE", 0)
    with terminal(monkeypatch) as shown:
        reflect_rl.watch(two_steps())
    before, *frames = shown[0].split("\x1b[?25l\x1b[H\x1b[J")
    assert before == "" and len(frames) == 3
    bar = "█" * 15 + " " * 15
    menu = f"     50.0%  {bar}  go\n  >  50.0%  {bar}  stop\n"
    assert frames[0] == f"at 1\n# Analyze:\nGo on.\n{menu}reward +0.50\n\n"
    assert frames[2] == "at the end\n\nsuccess after 2 steps, return +1.00\n\x1b[?25h"


def test_ctrl_c_while_watching_leaves_the_cursor(monkeypatch):
    def interrupt(seconds):
        assert seconds > 0
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with terminal(monkeypatch) as shown, pytest.raises(KeyboardInterrupt):
        reflect_rl.watch(two_steps())
    assert shown[0].count("\x1b[H") == 1 and shown[0].endswith("\x1b[?25h")


def test_watching_into_a_file(tmp_path, monkeypatch, capsys):
    """Catches escape codes or pauses where the output is no terminal, and a flag that reaches nobody."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a pause that nobody sees"))
    run_script(reflect_rl, "--env", "taxi", "--runs", tmp_path, "--watch", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "█" * 20 in out and " steps, return " in out.splitlines()[-1]
