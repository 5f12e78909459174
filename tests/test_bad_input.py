"""Bad input: one clear line on stderr, exit code 2, no traceback, and nothing lost."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from conftest import make_players, run_script, subprocess_of, table_of, tiny_options, tiny_rl_options
from corridor import Corridor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import curriculum
import envs
import eval as evaluation
import negatives
import reflect_rl
import rl
import sft

SCRIPTS = {
    "envs": envs,
    "reflect_rl": reflect_rl,
    "negatives": negatives,
    "sft": sft,
    "curriculum": curriculum,
    "rl": rl,
    "eval": evaluation,
}


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a script that must refuse; the one line that it says."""

    def run(module, *options):
        with pytest.raises(SystemExit) as end:
            envs.run_main(lambda: run_script(module, *options, monkeypatch=monkeypatch))
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2, said
        assert len(said) == 1 and said[0].startswith("error: ") and "Traceback" not in said[0], said
        return said[0]

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


# ---------------------------------------------------------------------------------------------------------
# Every script


def test_environments_have_settings_of_their_own(monkeypatch):
    """Catches an environment's settings that win over what the user gave, or that stay for the next environment."""
    monkeypatch.setattr(Corridor, "settings", {"trajectories": 77, "negatives": 0.25}, raising=False)

    def parsed(*options):
        parser = argparse.ArgumentParser()
        reflect_rl.add_common_options(parser)
        negatives.add_data_options(parser)
        monkeypatch.setattr(sys, "argv", ["negatives.py", *options])
        args = reflect_rl.parse_args(parser)
        return args.trajectories, args.negatives

    corridor = ("--env", "corridor:Corridor")
    assert parsed(*corridor) == (77, 0.25)
    assert parsed(*corridor, "--trajectories", "5") == (5, 0.25)
    assert parsed(*corridor, "--no-negatives") == (77, 0.0)
    assert parsed("--env", "taxi") == (200, 0.5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_environment(script, refused, tmp_path):
    """Catches a traceback for a typo in --env."""
    more = [] if script == "envs" else ["--runs", tmp_path / "runs"]
    assert "taxy" in refused(SCRIPTS[script], "--env", "taxy", *more)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/log.jsonl"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["--no-such-option", "--see=1"])
def test_unknown_option(script, option, capsys, monkeypatch):
    """Catches options that are ignored, and argparse's guessing at abbreviations (--see for --seed)."""
    with pytest.raises(SystemExit) as end:
        run_script(SCRIPTS[script], option, monkeypatch=monkeypatch)
    assert end.value.code == 2 and option in capsys.readouterr().err.splitlines()[-1]


def test_in_a_process_of_its_own():
    """The same through the real command line: exit code, stderr, stdout."""
    out, err = subprocess_of("curriculum.py", "--env", "taxy", code=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: unknown environment 'taxy'")


@pytest.mark.parametrize(
    "option", [("--env-option", "mode"), ("--env-option", "=3"), ("--seed", "one"), ("--bf16", "maybe")]
)
def test_bad_option_value(option, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_script(rl, *option, monkeypatch=monkeypatch)
    assert end.value.code == 2 and option[0] in capsys.readouterr().err.splitlines()[-1]


def test_bad_environment_option(refused, tmp_path):
    assert "colour" in refused(curriculum, "--env-option", "colour=red")
    assert "fly" in refused(negatives, "--env-option", "mode=fly", "--runs", tmp_path)


def test_unknown_device(refused, tmp_path, bases):
    """Catches torch's traceback for a device that there is not."""
    assert "abacus" in refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path), "--device", "abacus")


COUNTS = (
    "--updates",
    "--episodes",
    "--micro-batch",
    "--save-every",
    "--trajectories",
    "--batch",
    "--rank",
    "--repeats",
    "--group",
    "--epochs",
    "--minibatches",
)
OTHERS = (
    ("--negatives", 1.5),
    ("--negatives", -0.1),
    ("--replay", -1),
    ("--replay-buffer", -1),
    ("--eval-every", -1),
    ("--episodes", 1),  # REINFORCE's baseline is the mean of the batch
    ("--lr", "nan"),
    ("--rl-lr", 0),
    ("--group", 5),  # divides no batch here
)


@pytest.mark.parametrize("option", [*((name, 0) for name in COUNTS), *OTHERS])
def test_numbers_out_of_range(option, refused, tmp_path, bases):
    """Catches a ZeroDivisionError an hour into the run: refused before anything is trained."""
    assert option[0] in refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path / "runs"), *option)
    assert not list(tmp_path.rglob("adapter*"))


def test_runs_folder_that_is_a_file(refused, tmp_path, bases):
    (tmp_path / "runs").write_text("mine")
    assert "runs" in refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path / "runs"))
    assert (tmp_path / "runs").read_text() == "mine"


def test_unknown_split(refused, tmp_path):
    assert "dev" in refused(negatives, "--env", "taxi", "--runs", tmp_path, "--split", "dev")


# ---------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "no weights", "half the weights", "no tokenizer", "half a config", "a file"]
)
def test_model_directory_that_is_none(kind, refused, tmp_path, bases):
    """Catches a traceback out of transformers, and a hub download in place of an error."""
    folder = tmp_path / "model"
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("x")
    elif kind != "missing":
        shutil.copytree(bases["gpt2"], folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        if kind == "no weights":
            weights.unlink()
        elif kind == "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        else:
            half = weights if "weights" in kind else config
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    assert str(folder) in refused(sft, *tiny_options(folder, tmp_path / "runs"))


def words_only_model(folder, eos="<end>"):
    """A tokenizer that knows whole words only: no label continues a prompt by a token of its own."""
    words = ["<unk>", *([eos] if eos else []), "at", "goal", "last", "left", "right", "go"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=1, n_positions=1024)).save_pretrained(
        folder
    )
    return folder


class Crossroads(Corridor):
    """Corridor with more actions than any tokenizer here has labels for."""

    actions = tuple(f"go {i}" for i in range(130))

    def step(self, action):
        return super().step(min(action, 1))


@pytest.mark.parametrize("script", ["sft", "rl"])
def test_tokenizer_without_room_for_labels(script, refused, tmp_path, bases):
    """Catches an IndexError, or actions that silently have no label: both counts must be named, before training."""
    options = {"sft": tiny_options, "rl": tiny_rl_options}[script](bases["gpt2"], tmp_path / "runs")
    options[1] = "test_bad_input:Crossroads"
    line = refused(SCRIPTS[script], *options)
    assert "130" in line and str(len(make_players(bases["gpt2"]).labels.ids)) in line
    assert not list(tmp_path.rglob("adapter*"))


def test_tokenizer_without_any_label(refused, tmp_path):
    """Only words that are labels by accident: too few for three actions."""
    folder = words_only_model(tmp_path / "words")
    options = tiny_options(folder, tmp_path / "runs")
    options[1] = "test_bad_input:Crossroads"
    assert "130" in refused(sft, *options)


def test_tokenizer_without_end(refused, tmp_path):
    """Catches a reflector that can never stop."""
    assert "end" in refused(sft, *tiny_options(words_only_model(tmp_path / "words", eos=None), tmp_path / "runs"))


# ---------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("kind, words", [("malformed", "line 2"), ("empty", "empty"), ("missing", "nowhere")])
def test_bad_data_set(kind, words, refused, tmp_path, bases):
    """Catches a traceback, or a training on what could be read."""
    path = tmp_path / ("nowhere.jsonl" if kind == "missing" else "data.jsonl")
    records = negatives.make_records(Corridor, 4, 0.5, seed=0)
    if kind != "missing":
        negatives.write_records([] if kind == "empty" else records, path)
    if kind == "malformed":
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]))
    before = path.read_bytes() if path.exists() else None
    assert words in refused(sft, *tiny_options(bases["gpt2"], tmp_path / "runs"), "--data", path)
    assert not list(tmp_path.rglob("adapter*")) and (before is None or path.read_bytes() == before)


def test_an_example_too_long_for_a_later_stage(refused, tmp_path, bases):
    """Catches a training of `plain`, which has no reflections, that ends in an error about those of `reflect`."""
    records = negatives.make_records(Corridor, 4, 0.5, seed=0)
    long = dataclasses.replace(records[-1], reflection="a word " * 2000)
    negatives.write_records([*records, long], tmp_path / "data.jsonl")
    said = refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path / "runs"), "--data", tmp_path / "data.jsonl")
    assert "stage reflect" in said and "exceeds the model's context" in said
    assert not list(tmp_path.rglob("adapter*"))


def test_environment_without_teacher(refused, tmp_path, bases):
    class Silent(Corridor):
        reflection = property()

    globals()["Silent"] = Silent
    options = tiny_options(bases["gpt2"], tmp_path / "runs")
    options[1] = "test_bad_input:Silent"
    assert "reflection" in refused(sft, *options)


class Untaught(Corridor):
    """An environment of which nobody wrote a teacher or an expert."""

    reflection = property()
    expert_action = envs.Env.expert_action


def test_records_of_ones_own_need_no_teacher(refused, tmp_path, bases, monkeypatch, capsys):
    """Catches `--data` that asks for the teacher it replaces, or is ignored where SFT is done; and a table that ends in
    the traceback of the missing expert."""
    records = negatives.make_records(Corridor, 12, 0.5, seed=0)
    negatives.write_records(records, tmp_path / "mine.jsonl")
    options = tiny_rl_options(bases["gpt2"], tmp_path / "runs")
    options[1] = "test_bad_input:Untaught"
    run_script(rl, *options, "--data", tmp_path / "mine.jsonl", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    table = table_of(out)
    assert "untaught-rl-s0" in table and "random" in table and "expert" not in table
    kept = sum(record.trajectory not in (5, 11) for record in records)
    assert f"{kept} steps of {tmp_path / 'mine.jsonl'}" in out and kept < len(records)
    assert "other settings: data" in refused(rl, *options, "--resume")
    few = [record for record in records if record.trajectory < 5]
    assert negatives.hold_out(few) == {"train": few, "valid": few}


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("script", ["eval", "reflect_rl"])
def test_missing_run(script, refused, tmp_path):
    assert "nowhere" in refused(
        SCRIPTS[script], "--env", "corridor:Corridor", "--runs", tmp_path, "--run", tmp_path / "nowhere"
    )


def test_no_run_yet_says_how_to_make_one(refused, tmp_path):
    assert "rl.py" in refused(reflect_rl, "--env", "corridor:Corridor", "--runs", tmp_path)


@pytest.mark.parametrize("script", ["eval", "reflect_rl"])
@pytest.mark.parametrize("damage", ["half a config", "no adapters", "half the weights", "half an adapter config"])
def test_half_written_run(script, damage, refused, runs, bases):
    """Catches a traceback, a table without the run, and repairs that destroy what is left."""
    run = runs / "corridor-sft-s0"
    if damage == "half a config":
        (run / "config.json").write_text((run / "config.json").read_text()[:40])
    elif damage == "no adapters":
        for name in ("reflect", "policy", "plain"):
            shutil.rmtree(run / name)
    else:
        for path in run.glob("*/adapter_model.safetensors" if "weights" in damage else "*/adapter_config.json"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(run)
    line = refused(SCRIPTS[script], "--env", "corridor:Corridor", "--base", bases["gpt2"], "--runs", runs, "--run", run)
    assert "corridor-sft-s0" in line
    assert contents(run) == before


def test_a_broken_run_does_not_hide_the_others(runs, bases, capsys, monkeypatch):
    """Catches a table of all runs that dies of one that was stopped before its first checkpoint."""
    (runs / "corridor-rl-s7").mkdir()
    (runs / "corridor-rl-s7" / "config.json").write_text(json.dumps({"updates": 3, "base": str(bases["gpt2"])}))
    run_script(
        evaluation,
        "--env",
        "corridor:Corridor",
        "--base",
        bases["gpt2"],
        "--runs",
        runs,
        "--repeats",
        1,
        "--bf16",
        "off",
        monkeypatch=monkeypatch,
    )
    assert "corridor-sft-s0 with reflection" in capsys.readouterr().out


def test_task_out_of_range(refused, runs, bases):
    line = refused(
        reflect_rl,
        "--env",
        "corridor:Corridor",
        "--base",
        bases["gpt2"],
        "--run",
        runs / "corridor-sft-s0",
        "--task",
        99,
    )
    assert "99" in line and "5 tasks" in line


def test_plot_without_matplotlib_names_the_install(refused, tmp_path, monkeypatch):
    """Catches an ImportError where an optional extra is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(evaluation, "--runs", tmp_path, "--plot", tmp_path / "x.png")


def test_interrupt_ends_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        envs.run_main(main)
    assert end.value.code == 130 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "named"), [(("--base", "./nosuch"), "nosuch"), (("--env-option", "colour=red"), "colour")]
)
def test_a_typo_leaves_nothing_behind(wrong, named, refused, tmp_path, bases, monkeypatch):
    """Catches a run folder that remembers the misspelt option and refuses the right one."""
    options = tiny_rl_options(bases["gpt2"], tmp_path / "runs")
    assert named in refused(rl, *options, *wrong)
    run_script(rl, *options, monkeypatch=monkeypatch)


def test_an_unknown_split_is_noticed_before_the_training(refused, tmp_path, bases):
    options = tiny_rl_options(bases["gpt2"], tmp_path / "runs")
    assert "tset" in refused(rl, "--env", "taxi", *options[2:], "--split", "tset")
    assert not (tmp_path / "runs").exists()


def test_an_environment_without_tasks(refused, tmp_path, bases, monkeypatch):
    """Catches an IndexError where a split is empty."""
    monkeypatch.setattr(Corridor, "tasks", lambda self, split: ["x"] if split == "test" else [])
    assert "no tasks in its train split" in refused(rl, *tiny_rl_options(bases["gpt2"], tmp_path / "runs"))


def test_a_mistake_in_an_environments_constructor_is_shown():
    """Catches a TypeError of the environment's own code that is taken for a wrong option."""
    with pytest.raises(TypeError, match="NoneType"):
        envs.make("test_bad_input:Broken")


class Broken(Corridor):
    def __init__(self):
        super().__init__()
        self.length = None + 1


def test_plot_of_nothing(refused, tmp_path):
    pytest.importorskip("matplotlib")
    assert "no run" in refused(evaluation, "--runs", tmp_path, "--plot", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_user_error_of_an_own_environment_is_one_line(tmp_path):
    """Catches `python envs.py` being a second copy of the module, whose `UserError` is another class."""
    (tmp_path / "mine.py").write_text(
        "import envs\nclass Mine(envs.Env):\n    def tasks(self, split):\n        raise envs.UserError('not mine')\n"
    )
    done = subprocess.run(
        [sys.executable, envs.__file__, "--env", "mine:Mine"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "error: not mine\n"
