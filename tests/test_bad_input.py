"""Bad input ends with one line on stderr and exit code 2: no traceback, nothing lost, nothing of it executed.

Other suites have the bad input of their module: environments, a closed pipe, an ASCII terminal (test_envs), records
(test_negatives), repositories (test_autoexplore), adapters and the forms of options (test_reflect_rl), lengths
(test_sft), runs that name a module (test_eval). Here are options, bases and run folders as the scripts meet them.
"""

import gc
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import Killed, read_log, run_script, sft_folder, subprocess_of, tiny_options, tiny_rl_options
from corridor import Corridor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import curriculum
import envs
import eval as evaluation
import plumbing.options
import plumbing.runs
import negatives
import reflect_rl
import rl
import sft


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a script that must refuse; the one line that it says."""

    def run(script, *options):
        capsys.readouterr()
        monkeypatch.setattr(envs, "OWN_MODULES", set())  # this file is an environment's module, too
        with pytest.raises(SystemExit) as end:
            envs.run_main(lambda: run_script(script, *options, monkeypatch=monkeypatch))
        gc.collect()  # the lock goes with its process
        said = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


class Bomb:
    """A pickle that runs a command where it is loaded in Python's own way."""

    def __init__(self, folder):
        self.path = folder / "exploded"

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# ---------------------------------------------------------------------------------------------------------
# Options


def test_in_a_process_of_its_own():
    out, err = subprocess_of("curriculum.py", "--env", "taxy", code=2)
    assert out == "" and err.startswith("error: unknown environment 'taxy'") and err.count("\n") == 1


@pytest.mark.parametrize("script", [reflect_rl, negatives, sft, curriculum, rl, evaluation])
def test_every_script_refuses_typos(script, refused, tmp_path, capsys, monkeypatch):
    """Catches options that are ignored, argparse's guessing at abbreviations, and folders of what cannot be."""
    wrong = ["--no-such-option", "--see=1", "--env-option=mode", "--seed=one", "--labels=digits"]
    for option in [*wrong, *{sft: ["--stage=all"], rl: ["--algo=sarsa", "--reflection"]}.get(script, [])]:
        with pytest.raises(SystemExit) as end:
            run_script(script, option, monkeypatch=monkeypatch)
        last = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and " error: " in last and option.split("=")[0] in last
    assert "taxy" in refused(script, "--env", "taxy", "--runs", tmp_path / "runs")
    assert "abacus" in refused(script, "--device", "abacus", "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script, tables", [
    (sft, [plumbing.options.COMMON, sft.DATA_OPTIONS, sft.OPTIONS]), (rl, [rl.OPTIONS]),
    (evaluation, [evaluation.OPTIONS]),
])
def test_every_number_has_a_bound(script, tables, capsys, monkeypatch):
    """Catches a ZeroDivisionError an hour into the run, and a sign that turns a gradient round."""
    for name, (default, _, *limit) in [row for table in tables for row in table.items()]:
        option = f"--{name.replace('_', '-')}"
        least = 1 if limit and callable(limit[0]) else limit[0] if limit else 0
        for value in [least - 1, "nan", "x"] if type(default) in (int, float) and name != "seed" else []:
            with pytest.raises(SystemExit) as end:
                run_script(script, f"{option}={value}", monkeypatch=monkeypatch)
            assert end.value.code == 2 and option in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("wrong", [
    "--base ./nosuch", "--data nosuch.jsonl", "--episodes 1", "--algo grpo --episodes 6", "--algo rloo --replay 1",
    "--env-option colour=red", "--name ../x",
])
def test_a_typo_leaves_nothing_behind(wrong, refused, tmp_path, bases):
    """Catches a run folder that remembers what was misspelt, and a mistake that shows only after SFT."""
    line = refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path / "runs"), *wrong.split())
    *_, option, value = wrong.split()
    assert (option in line or value.partition("=")[0] in line) and not (tmp_path / "runs").exists()


def test_the_right_path_works_after_a_wrong_one(refused, tmp_path, bases, monkeypatch):
    """Also: records of one's own need no teacher, and a file in place of the runs stays."""
    monkeypatch.setattr(Corridor, "reflection", envs.Env.reflection)
    options = [*tiny_rl_options(bases["gpt2"], tmp_path / "runs"), "--updates", 1, "--data", tmp_path / "own.jsonl"]
    assert "own.jsonl" in refused(rl, *options)
    assert "needs a method reflection()" in refused(rl, *options[:-2])
    negatives.write_lines(tmp_path / "own.jsonl", [negatives.Record(0, False, False, "s", "r", ("a", "b"), 0)])
    run_script(rl, *options, monkeypatch=monkeypatch)
    assert len(read_log(tmp_path / "runs" / "corridor-rl-s0")) == 1
    negatives.write_lines(tmp_path / "own.jsonl", [negatives.Record(0, False, False, "s", "other", ("a", "b"), 0)])
    before = contents(tmp_path)
    assert "data_digest" in refused(rl, *options, "--resume"), "the old policy would go on with another reflector"
    assert "own.jsonl" in refused(rl, *options, "--runs", tmp_path / "own.jsonl") and contents(tmp_path) == before


def test_what_is_not_there(refused, tmp_path):
    for script in (negatives, evaluation):
        assert "dev" in refused(script, "--runs", tmp_path / "x", "--split", "dev")
    for script in (evaluation, reflect_rl):
        assert "nowhere is no run" in refused(script, "--run", tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


class Crossroads(Corridor):
    """More actions than any tokenizer here has labels for."""

    actions = tuple(f"go {i}" for i in range(130))

    def step(self, action):
        return super().step(min(action, 1))


def test_own_environments(tmp_path, bases, monkeypatch, refused):
    """Catches a training with too few labels, of which both counts are named before it; and an OSError of the user's
    code in one line that does not say where it was."""
    options = [*tiny_rl_options(bases["gpt2"], tmp_path), "--env", "test_bad_input:Crossroads"]
    line = refused(rl, *options)
    assert "130 actions" in line and "one-token labels" in line and not list(tmp_path.rglob("*.pt"))
    monkeypatch.setattr(Crossroads, "tasks", lambda self, split: open("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        envs.run_main(lambda: run_script(rl, *options, "--seed", 1, monkeypatch=monkeypatch))


# ---------------------------------------------------------------------------------------------------------
# Bases


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other_tokenizer(folder, tokenizer, **special):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WORDS = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "go": 2}, unk_token="<unk>"))
SPOILT = {
    "missing": shutil.rmtree,
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "half weights": lambda folder: halve(folder / "model.safetensors"),
    "half config": lambda folder: halve(folder / "config.json"),
    "half tokenizer": lambda folder: halve(folder / "tokenizer.json"),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "other shapes": lambda folder: change_config(folder, n_embd=64),
    "unknown model": lambda folder: change_config(folder, model_type="oracle"),
    "no LM": lambda folder: change_config(folder, model_type="vit"),
    "no labels": lambda folder: other_tokenizer(folder, WORDS, unk_token="<unk>", eos_token="</s>"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_directory_that_is_no_base(kind, refused, tmp_path, bases):
    """Catches a traceback out of transformers, and a hub download in place of an error; test_bases has the others."""
    folder = shutil.copytree(bases["gpt2"], tmp_path / "model")
    SPOILT[kind](folder)
    line = refused(sft, *tiny_options(folder, tmp_path / "runs"))
    assert ("0 one-token labels" if kind == "no labels" else str(folder)) in line
    assert not list(tmp_path.glob("runs/**/*.pt"))


# ---------------------------------------------------------------------------------------------------------
# Run folders


@pytest.fixture(scope="module")
def stopped(sft_runs, bases, tmp_path_factory):
    """A runs folder with an RL run that was killed in its third update of four."""
    folder, calls, real = tmp_path_factory.mktemp("stopped") / "runs", [], rl.give_advantages
    shutil.copytree(sft_runs, folder)

    def dying(*rest):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return real(*rest)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        monkeypatch.setattr(rl, "give_advantages", dying)
        run_script(rl, *tiny_rl_options(bases["gpt2"], folder), monkeypatch=monkeypatch)
    gc.collect()
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(stopped, tmp_path / "runs") / "corridor-rl-s0"


def resume(run, bases):
    return [*tiny_rl_options(bases["gpt2"], run.parent), "--resume"]


CONFIGS = ["missing", "half", "", "[]", "3", '{"model_type": "gpt2"}', "[" * 100_000, "\udcff", {"env": 3},
           {"base": None}, {"max_reflection": "9"}, {"env_option": [1]}, {"env_option": "x"}]


@pytest.mark.parametrize("kind", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_is_none(kind, refused, run, bases, capsys, monkeypatch):
    """Catches a traceback, a restart over the log of a run whose config was deleted, and one bad folder that hides
    the others."""
    shutil.copytree(sft_folder(run.parent) / "policy", run / "policy")
    path = run / "config.json"
    if kind == "missing":
        path.unlink()
    elif kind == "half":
        halve(path)
    elif isinstance(kind, dict):
        change_config(run, **kind)
    else:
        path.write_text(kind, encoding="utf-8", errors="surrogateescape")
    before = contents(run)
    assert str(run) in refused(rl, *resume(run, bases))
    where = ["--env", "corridor:Corridor", "--runs", run.parent, "--device", "cpu"]
    for script in (evaluation, reflect_rl):
        assert f"{run} is no run" in refused(script, *where, "--run", run)
    assert contents(run) == before
    run_script(reflect_rl, *where, monkeypatch=monkeypatch)  # plays the other one
    out = capsys.readouterr().out
    assert "after" in out.splitlines()[-1] and (f"note: {run}" in out or kind == "missing")


@pytest.mark.parametrize("kind", ["half", "text", "pickle", "bomb", "list", "no step", "other shapes", "too few"])
def test_a_checkpoint_that_is_none(kind, refused, run, bases, tmp_path):
    """Catches a traceback, a run that begins anew over what is left, a pickle that runs a command."""
    path = run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    parameters = state["parameters"]
    if kind == "half":
        halve(path)
    elif kind in ("text", "pickle"):
        path.write_bytes(b"mine" if kind == "text" else pickle.dumps(Bomb(tmp_path), 2))
    else:
        other = {"list": [1], "bomb": state | {"more": Bomb(tmp_path)}, "no step": {**state}}
        del other["no step"]["step"]
        other["too few"] = state | {"parameters": parameters[1:]}
        other["other shapes"] = state | {"parameters": [p[:, :3] for p in parameters]}
        torch.save(other[kind], path)
    before = contents(run)
    assert f"{path} cannot be read" in refused(rl, *resume(run, bases))
    assert contents(run) == before and not (tmp_path / "exploded").exists()


def test_a_damaged_log_is_no_hindrance(run, bases, monkeypatch):
    """Catches a resume that dies of half a line, or keeps what is no line of its log."""
    whole = shutil.copytree(run.parent, run.parent.parent / "whole") / run.name
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": "x"}\n3\n\n' + b"[" * 100_000 + b'\n{"step": 99}\n{"step": 2, "succ')
    for folder in (run, whole):
        run_script(rl, *resume(folder, bases), monkeypatch=monkeypatch)
    assert read_log(run) == read_log(whole) and len(read_log(run)) == 4


@pytest.mark.parametrize("name", ["checkpoint.tmp", "log.jsonl.tmp", "policy/adapter_model.safetensors.tmp", ".lock"])
def test_a_full_disk_is_one_line(name, refused, run, bases, monkeypatch):
    """Also a directory in place of a file. Catches a traceback of torch, and a write that damages what was there.
    Afterwards the run goes on."""
    (run / "policy").mkdir()
    if name == ".lock":
        (run / name).unlink()
        (run / name).mkdir()
    else:
        (run / name).symlink_to("/dev/full")
    before = (run / "checkpoint.pt").read_bytes()
    line = refused(rl, *resume(run, bases))
    assert "No space left" in line or "checkpoint.tmp" in line or "Is a directory" in line
    assert (run / "checkpoint.pt").read_bytes() == before or "adapter" in name
    (run / name).rmdir() if name == ".lock" else (run / name).unlink()
    run_script(rl, *resume(run, bases), monkeypatch=monkeypatch)
    assert len(read_log(run)) == 4 and (run / "policy" / "adapter_config.json").exists()


# ---------------------------------------------------------------------------------------------------------
# Weights without bound


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_weights_without_bound_are_not_saved(value, run):
    """Catches a checkpoint with which every resume fails in the same way."""
    before, this = contents(run), object.__new__(plumbing.runs.Run)
    this.folder, parameter = run, torch.nn.Parameter(torch.tensor([1.0, value]))
    with pytest.raises(envs.UserError, match="update 3: .*; the checkpoint before it is kept"):
        this.save(3, [parameter], torch.optim.AdamW([parameter]))
    assert contents(run) == before


@pytest.mark.parametrize("rate", ["--lr 1e30", "--lr inf", "--rl-lr 1e30", "--rl-lr inf"])
@pytest.mark.parametrize("every", [0, 1])
def test_a_rate_too_large_is_one_line(rate, every, refused, runs, bases):
    """Catches a ValueError in the middle of the play that follows, and a run that cannot be resumed."""
    before = contents(runs)
    line = refused(rl, *tiny_rl_options(bases["gpt2"], runs), "--eval-every", every, *rate.split())
    assert "update 1: the weights grow without bound" in line or "the model's outputs are not finite" in line
    assert not [path for path in runs.rglob("checkpoint.pt") if path not in before]


@pytest.mark.parametrize("name", ["reflect", "policy"])
def test_players_that_are_not_finite_do_not_play(name, refused, runs, bases):
    """Catches a NaN reflector, which would write something."""
    path = sft_folder(runs) / name / "adapter_model.safetensors"
    save_file({key: tensor * torch.nan for key, tensor in load_file(path).items()}, path)
    before = contents(runs)
    for script in (evaluation, reflect_rl):
        where = ["--env", "corridor:Corridor", "--runs", runs, "--device", "cpu", "--run", sft_folder(runs)]
        assert "not finite" in refused(script, *where)
    assert "not finite" in refused(rl, *tiny_rl_options(bases["gpt2"], runs))
    assert before.items() <= contents(runs).items()
