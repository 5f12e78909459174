"""What the README and the lesson say can be done can be done; what they say was measured stands in the docs."""

import argparse
import importlib
import re
import shlex
import shutil

import pytest
from conftest import ROOT, load_script

import eval as evaluation
import sft

PAGES = ("README.md", "docs/lesson.md", "docs/environments.md", "docs/teacher.md")
DATA = "--trajectories 4"
SFT = f"{DATA} --reflect-steps 1 --policy-steps 1 --max-reflection 4"
SMALL = {  # options that make a run of a script as small as can be
    "rl.py": f"--device cpu {SFT} --updates 1 --episodes 4 --eval-every 0 --repeats 1",
    "sft.py": f"--device cpu {SFT}",
    "negatives.py": DATA,
    "eval.py": "--device cpu --repeats 1",
    "reflect_rl.py": "--device cpu",
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page):
    """The Python commands of a page in their order: `(script, options)`, from its blocks and from its lines."""
    found = []
    for language, block, inline in re.findall(r"```(\w*)\n(.*?)```|`([^`]+)`", read(page), re.S):
        if language:
            continue  # a change of the code
        lines = [re.sub(r" #.*", "", line) for line in block.splitlines()] or [" ".join(inline.split())]
        for line in lines:
            for part in line.split("&&"):
                command = re.fullmatch(r"\s*(?:python|torchrun --nproc-per-node \d+) (\S+\.py)(.*)", part)
                if command:
                    found.append((command[1], shlex.split(command[2])))
    return found


def has_placeholder(options):
    """Whether a value is left to the reader, such as DIR."""
    return any(re.fullmatch("[A-Z]+", option) for option in options)


def main_of(script):
    """The `main` of a script, whether it is one of the seven files or stands beside its data."""
    return importlib.import_module(script[:-3]).main if "/" not in script else load_script(script).main


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, monkeypatch):
    """Catches an option that was renamed, also in commands that no test can run."""

    class Parsed(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *options):
        parse(parser, *options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    commands = commands_of(page)
    assert commands
    for script, options in commands:
        monkeypatch.setattr("sys.argv", [script, *options])
        with pytest.raises(Parsed):
            main_of(script)()


def run(commands, folder, base, monkeypatch):
    """Run commands in a folder that looks like the project's, each as small as can be."""
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "models" / "nano" / "adapters", "models/nano/adapters")
    for path in ("path/to/model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(base, path)
    monkeypatch.setattr(evaluation, "PANEL", 2)
    monkeypatch.setattr(sft, "HELD_OUT", 2)
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    for number, (script, options) in enumerate(commands):
        given = [script, *options, *SMALL.get(script, "").split()]
        if script == "rl.py" and "--runs" not in given:  # the README shows many ways to begin
            given += ["--runs", f"runs-{number}"]
        if (script, options) not in commands[:number]:
            monkeypatch.setattr("sys.argv", given)
            main_of(script)()


@pytest.mark.parametrize("page", PAGES[:2])
def test_every_command_runs(page, tmp_path, bases, monkeypatch):
    """Catches a command that does not do what the page says, and a page whose steps do not follow from each other."""
    commands = []
    for script, options in commands_of(page):
        if not has_placeholder(options) and not any(option.startswith("gym:") for option in options):
            commands.append((script, options))
    assert len(commands) >= 8
    run(commands, tmp_path, bases["gpt2"], monkeypatch)


@pytest.mark.extra
def test_commands_with_gymnasium_run(tmp_path, bases, monkeypatch):
    pytest.importorskip("gymnasium")
    commands = [command for command in commands_of("README.md") if any(o.startswith("gym:") for o in command[1])]
    assert commands
    run(commands, tmp_path, bases["gpt2"], monkeypatch)


def test_changes_of_the_lesson_fit_the_code():
    """Catches a lesson whose line to break was changed or moved to another file."""
    changes = re.findall(r"```diff\n--- (\S+)\n(.*?)```", read("docs/lesson.md"), re.S)
    assert len(changes) == 3
    for path, change in changes:
        source = read(path)
        lines = change.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert old != new and source.count(old) == 1, f"{path}:\n{old}"
        compile(source.replace(old, new), path, "exec")


def test_every_figure_of_the_readme_is_in_the_docs():
    """Catches a figure that was typed, or one that was not changed with its table. (A figure alone is a weak check: it
    may be in any line of the docs. One with its interval must stand in one row.)"""
    no_figures = r"(?m)^(?:python|torchrun)(?:(?! #).)*|`[^`\n]*`|\]\([^)]*\)|(?:arXiv|Python) \S+"
    text = re.sub(no_figures, "", read("README.md"))
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "models" / "nano" / "README.md"]
    lines = [set(re.findall(r"-?\d+(?:\.\d+)?", line.replace(",", ", ").replace(" +", " ")))
             for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    rates = re.findall(r"(-?\d+\.\d)(?:%| points)?\s\[(-?\d+\.\d),\s(-?\d+\.\d)\]", text)
    assert len(rates) > 15
    for rate in rates:  # the figure and its interval, in one row
        assert any(set(rate) <= line for line in lines), rate
    for figure in re.findall(r"(?<![\d.-])\d+\.\d+|(?<![\w.-])\d{3,}(?![\w.-])", text):
        assert any(figure in line for line in lines), figure
