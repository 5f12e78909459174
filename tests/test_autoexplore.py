"""AutoExplore: the episode, the shipped data and its maker, and directories of anybody's."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import envs
import negatives
from envs import AutoExplore, UserError, files_of
from plumbing.words import stems_of, words_of

prepare = envs.beside("autoexplore/prepare.py")
show_name = prepare.show_name
SPLITS = ("train", "valid", "templates", "test", "final")
GUARDS = json.loads((Path(__file__).parent / "guards.json").read_text(encoding="utf-8"))


def play(env, task, choose, **options):
    """One episode, checking the contract at every step: `(states, actions taken, last info)`."""
    state, info = env.reset(seed=1, options={"task": task} | options)
    states, taken, over = [state], [], False
    while not over:
        assert info["actions"] and len(set(info["actions"])) == len(info["actions"]) <= envs.PAGE_ACTIONS
        assert "\n" not in "".join(info["actions"])
        action = choose(env)
        taken.append(info["actions"][action])
        state, reward, terminated, truncated, info = env.step(action)
        assert isinstance(reward, float) and info["success"] == (terminated and reward > 0)
        assert state.startswith("Question: ") and task["question"] in state
        states.append(state)
        over = terminated or truncated
    assert len(taken) <= env.horizon
    return states, taken, info


def at_random(rng):
    return lambda env: rng.randrange(len(env.actions))


def sample(tasks, count):
    return random.Random(0).sample(tasks, min(count, len(tasks)))


def env_of(tree):
    """An environment with one repository, `any`."""
    env = AutoExplore()
    env.repos = {"any": tree}
    return env


def task_for(target, question="Which file explains the thing?"):
    return {"question": question, "targets": [target], "repo": "any"}


def write_tree(tree, folder):
    for name, node in tree.items():
        if isinstance(node, dict):
            (folder / name).mkdir()
            write_tree(node, folder / name)
        else:
            (folder / name).write_text(node, encoding="utf-8")


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# The episode


def test_expert_recovers_from_mistakes_and_within_small_pages(monkeypatch):
    monkeypatch.setattr(envs, "PAGE_ACTIONS", 5)
    env, rng = AutoExplore(horizon=60), random.Random(0)
    for task in sample(env.tasks("train"), 100):
        mistakes = itertools.chain([True] * 4, itertools.repeat(False))

        def choose(env, mistakes=mistakes):
            return rng.choice(env.mistakes() or [env.expert_action()]) if next(mistakes) else env.expert_action()

        assert play(env, task, choose)[2]["success"], task


def test_equal_seeds_give_equal_episodes():
    def run():
        env, rng = AutoExplore(shuffle=True, leave_out=0.5), random.Random(3)
        return [play(env, task, at_random(rng))[:2] for task in sample(env.tasks("train"), 20)]

    random.seed(1)
    first = run()
    random.seed(2)  # a use of the process-wide generator would show
    before = random.getstate()
    assert run() == first and random.getstate() == before


def test_wrong_answer_is_a_failure_and_ends():
    env = AutoExplore()
    task = next(task for task in env.tasks("train") if task["depth"] > 0)
    _, info = env.reset(options={"task": task})
    wrong = next(i for i, action in enumerate(info["actions"]) if action.startswith("id "))
    _, reward, terminated, truncated, info = env.step(wrong)
    assert reward < 0 and terminated and not truncated and not info["success"]


def test_horizon_truncates_and_a_file_is_read_once():
    env, rng = AutoExplore(), random.Random(0)
    task = next(task for task in env.tasks("train") if task["depth"] == 2)

    def wander(env):
        return rng.choice([i for i, (verb, _) in enumerate(env.moves) if verb != "id"])

    _, taken, info = play(env, task, wander)
    assert len(taken) == env.horizon and not info["success"]
    env.reset(options={"task": task})
    name = next(name for verb, name in env.moves if verb == "cat")
    env.step(env.moves.index(("cat", name)))
    assert ("cat", name) not in env.moves and ("id", name) in env.moves


def test_pages_show_every_entry_exactly_once(monkeypatch):
    monkeypatch.setattr(envs, "PAGE_ACTIONS", 8)
    env = env_of({f"file{i:02}.txt": "text" for i in range(40)} | {f"dir{i}": {} for i in range(9)})
    _, info = env.reset(options={"task": task_for("file31.txt")})
    first, shown = info["actions"], []
    while not shown or info["actions"] != first:
        assert len(info["actions"]) <= 8
        shown += [action for action in info["actions"] if action != "more"]
        _, _, _, _, info = env.step(info["actions"].index("more"))
        env.steps = 0
    assert len(shown) == len(set(shown)) == 9 + 2 * 40
    while not env.success:
        env.step(env.expert_action())


def test_pages_have_a_limit_of_characters(monkeypatch):
    """Catches a package's long names, each several times in a prompt, that exceed the context; a name that is lost."""
    monkeypatch.setattr(envs, "PAGE_ACTIONS", 100)
    names = [f"{'long_name_' * (i % 5)}{i}.py" for i in range(30)] + ["x" * 159, "y" * 200]
    pages = envs.pages_of(dict.fromkeys(names, "text"))
    assert sorted(name for page in pages for name in page) == sorted(names)
    lengths = [[len(name) for name in page] for page in pages]
    assert all(sum(page) <= 160 or page == [200] for page in lengths) and 3 < len(pages) < 10
    for page, after in itertools.pairwise(lengths):
        assert sum(page) + after[0] > 160, "a page is begun although the last one has room"


def test_leave_out_hides_files_but_never_a_target_nor_the_way_to_it():
    env = AutoExplore(leave_out=0.9)
    for task in sample(env.tasks("train"), 60):
        assert play(env, task, AutoExplore.expert_action)[2]["success"]
        assert env.hidden and env.hidden.isdisjoint(env.targets)
    env.reset(options={"task": task, "leave_out": 0.0})
    assert not env.hidden


def test_shuffle_changes_the_order_only_and_is_off_by_default():
    env = AutoExplore()
    task = env.tasks("train")[0]
    _, plain = env.reset(seed=0, options={"task": task})
    orders = {env.reset(seed=seed, options={"task": task, "shuffle": True})[1]["actions"] for seed in range(5)}
    assert len(orders) > 1 and all(sorted(order) == sorted(plain["actions"]) for order in orders)


def test_states_and_reflections_are_short():
    """What a small model with a context of a few hundred tokens can read."""
    env, rng = AutoExplore(), random.Random(0)
    for task in sample(env.tasks("train") + env.tasks("templates"), 200) + env.tasks("test") + env.tasks("final"):
        state, info = env.reset(options={"task": task})
        longest, mistake, over = 170 if task["kind"] == "people's" else 130, False, False
        while not over:
            reflection = negatives.reflection_of(env, mistake)
            assert "Next: " in reflection and "\n" not in reflection
            assert env.actions[env.expert_action()] not in reflection  # the decision is the policy's
            assert prepare.count_tokens(reflection) <= 130 and prepare.count_tokens(state) <= longest
            mistake = bool(env.mistakes()) and rng.random() < 0.3
            action = rng.choice(env.mistakes()) if mistake else env.expert_action()
            state, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated


def test_mistakes_where_the_answer_is_are_near_misses():
    """Catches teacher data that rarely read a wrong file: the reflector then says that every file has the answer."""
    env, near = AutoExplore(), 0
    for task in sample(env.tasks("train"), 60):
        env.reset(options={"task": task})
        while not env.seen & env.targets:
            found, expert = [env.moves[i] for i in env.mistakes()], env.moves[env.expert_action()]
            assert expert not in found and all(verb != "id" for verb, _ in found)
            others = [move for move in env.moves if move[0] == "cat" and move != expert]
            if expert[0] == "cat" and others:
                assert found == others
                near += 1
            env.step(env.expert_action())
        assert env.mistakes() == []
    assert near > 25
    records, _ = negatives.make_records(AutoExplore, 100, 1.0, seed=0)
    misses = [r for r in records if "that is the wrong file" in r.reflection and "read a file here" in r.reflection]
    assert len(misses) > 0.03 * len(records), "and they must be made"


# ---------------------------------------------------------------------------------------------------------
# The shipped data


@pytest.mark.parametrize("guard", [name for name in GUARDS if name.startswith("autoexplore")])
def test_shipped_data_is_that_of_before(guard):
    """Catches another panel, and another text that `cat` shows: no figure could be compared with earlier ones."""
    env, name = AutoExplore(), guard.split()[2]
    if " trees " in guard:
        assert digest({task["repo"]: env.repos[task["repo"]] for task in env.tasks(name)}) == GUARDS[guard]
    elif " tree " in guard:
        assert digest(env.repos[name]) == GUARDS[guard]
    else:
        tasks = [task for task in env.tasks(name) if task["kind"] == "written" or not guard.endswith("written")]
        assert digest([[t["question"], t["targets"], t["repo"], t["depth"]] for t in tasks]) == GUARDS[guard]


def test_the_maker_makes_what_is_shipped(capsys, monkeypatch):
    """Catches data that nobody can make again, and a --check that says yes to anything."""
    made = prepare.make()
    monkeypatch.setattr(prepare, "make", lambda: made)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--check"])
    prepare.main()
    assert "is what prepare.py makes" in capsys.readouterr().out
    made["tasks"]["test"].pop()
    with pytest.raises(SystemExit, match="is not what"):
        prepare.main()


def test_splits_are_disjoint_by_repository_and_training_has_many():
    """Catches test repositories in teacher data, and too few words (they would be learned by heart)."""
    env = AutoExplore()
    repos = {split: {task["repo"] for task in env.tasks(split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert repos[one].isdisjoint(repos[other])
    assert set(env.repos) == set.union(*repos.values())
    keys = [(task["repo"], task["question"]) for split in SPLITS for task in env.tasks(split)]
    assert len(keys) == len(set(keys))
    for split in SPLITS:
        assert {task["depth"] for task in env.tasks(split)} == {0, 1, 2, 3}
    train = [task["repo"] for task in env.tasks("train")]
    written = {name for name in train if ":" not in name}
    reworded = [name.split(":")[2] for name in train if name.startswith("reworded:")]
    once = [name for name in train if name.startswith("generated:") and int(name[10:]) >= 10 * prepare.INVENTED]
    assert (len(train), len(reworded), len(once)) == (2000, 800, 600)
    assert len(set(once)) == 600 and set(reworded) == written
    for split in ("valid", "templates"):
        assert {task["kind"] for task in env.tasks(split)} == {"written", "generated"}
    assert env.groups(env.tasks("templates")[0]) == ("depth 1", "written repository")


def test_peoples_questions_can_be_answered_and_come_once():
    """Catches a question that is asked twice, a long one, one whose answer is too far away; a repository that nobody
    asks about, or in both splits."""
    env, names = AutoExplore(), []
    tasks = env.tasks("test") + env.tasks("final")
    for split in ("test", "final"):
        folders = {path.name for path in (prepare.HERE / "people" / split).iterdir() if path.is_dir()}
        assert len(folders) == 12 and folders == {task["repo"] for task in env.tasks(split)}
        names += map(str.lower, folders)
    assert len(set(names)) == 24 and {task["kind"] for task in tasks} == {"people's"}
    assert len({task["question"].lower() for task in tasks}) == len(tasks)
    for task in tasks:
        assert 1 < len(task["question"].split()) <= 20 and task["question"].endswith("?"), task
        assert play(env, task, AutoExplore.expert_action)[2]["success"], task


def test_a_question_has_one_answer_and_does_not_name_it():
    env = AutoExplore()
    for task in sample(env.tasks("train"), 300) + sample(env.tasks("templates"), 100):
        (target,) = task["targets"]
        name = target.split("/")[-1]
        assert name.lower() not in task["question"].lower()
        spoken = f" {' '.join(''.join(c if c.isalpha() else ' ' for c in task['question'].lower()).split())} "
        given = " ".join("".join(c if c.isalpha() else " " for c in name.rpartition(".")[0].lower()).split())
        assert f" {given} " not in spoken, task
        able = []
        for path, text in files_of(env.repos[task["repo"]]):
            if stems_of(task["question"]) <= stems_of(" ".join([text, *path[:-1]])):
                able.append("/".join(path))
        assert able == [target], task  # alone among all files, what is shown of it and its path have all the words


def words_in(tree):
    return set(re.findall("[a-z]+", " ".join(f"{' '.join(path)} {text}" for path, text in files_of(tree)).lower()))


def test_themes_and_invented_words_stay_in_their_splits():
    """Catches words of the themes of `valid` and `test` in training repositories, and one vocabulary for all."""
    words = {}
    for split, themes in prepare.vocabulary()["themes"].items():
        words[split] = {word for theme in themes.values() for d, things in theme.items() for word in (d, *things)}
    held_out = words["valid"] | words["test"]
    assert words["train"].isdisjoint(held_out) and len(held_out) > 60
    for seed in range(30):
        directories = {name for path, _ in files_of(prepare.generate_tree(seed)) for name in path[:-1]}
        assert directories <= words[prepare.split_of_seed(seed)] | set(prepare.vocabulary()["places"])
    invented = [words_in(prepare.generate_tree(seed)) for seed in range(prepare.INVENTED, prepare.INVENTED + 40)]
    assert len(set.union(*invented)) > 2000 and not set.union(*invented) & held_out
    everywhere = set.union(*(words_in(prepare.generate_tree(seed)) for seed in range(3)))
    assert len(invented[0] - everywhere) > 60 and len((invented[0] & invented[1]) - everywhere) < 10


def test_a_reworded_repository_is_the_same_in_other_words():
    """Catches words left as they are (they would be learned by heart), words of one family torn apart, other endings of
    file names, and code that is none any more."""
    tree = prepare.read_directory(prepare.HERE / "repos" / "chess_club")
    other = prepare.reworded_tree(0, "chess_club", tree)
    assert other == prepare.reworded_tree(0, "chess_club", tree) != prepare.reworded_tree(1, "chess_club", tree)
    files, others = list(files_of(tree)), list(files_of(other))
    endings = [sorted(path[-1].rpartition(".")[2] for path, _ in part) for part in (files, others)]
    assert endings[0] == endings[1]
    texts = [" ".join(" ".join([*path, text]) for path, text in part) for part in (files, others)]
    kept = set(words_of(texts[0])) & set(words_of(texts[1])) - prepare.KEPT
    assert len(kept) < 10 and len(words_of(texts[0])) == len(words_of(texts[1]))
    assert texts[1].count("def ") == texts[0].count("def ") > 2
    families = [len(stems_of(text)) for text in texts]
    assert abs(families[0] - families[1]) < 0.05 * families[0]


# ---------------------------------------------------------------------------------------------------------
# Questions about any file


def test_rules_ask_about_every_kind_of_file():
    def phrases(name, text):
        return [f"{verb} {phrase}" for _, verb, phrase in prepare.facts_of(name, text)]

    assert "explains shipping abroad" in phrases("a.md", "# Shipping abroad\nParcels take a week.")
    assert "says: parcels take a week" in phrases("a.md", "# Shipping abroad\nParcels take a week.")
    assert "gives the price of Green tea" in phrases("a.csv", "tea,price\nGreen tea,3")
    assert "sets the fee of late return" in phrases("a.json", '{\n  "late_return": {\n    "fee": 3\n  }\n}')
    assert "sets the fee of late return" in phrases("a.yaml", "late_return:\n  fee: 3")
    assert "defines parse chip" in phrases("a.py", '"""Read the chip."""\ndef parse_chip(line): ...')
    assert "says: read the chip" in phrases("a.py", '"""Read the chip."""\ndef parse_chip(line): ...')
    assert phrases("a.md", "[binary file]") == phrases("a.csv", "") == []
    # Catches a regular expression with three unbounded runs of blanks in a row: hours on this line.
    blanks = " " * 3000
    assert phrases("a.yaml", f"{blanks}late{blanks}!\n{blanks}- fee{blanks}: 3") == ["sets the fee"]


def phrases_of(name, text):
    return [phrase for _, _, phrase in prepare.facts_of(name, prepare.cut_text(prepare.shown_text(name, text)))]


def test_documents_are_shown_without_markup_and_asked_in_whole_sentences():
    """Catches `it gives an overview of how to create the?`, and rulers and directives that fill what `cat` shows."""
    page = """.. currentmodule:: jinja2
The Template Cache
==================
The `Cache`_ keeps templates that were compiled before, in the order of
their last use, see :class:`~jinja2.BytecodeCache`. It is cleared (e.g. after
an upgrade) by a command.
```{toctree}
depth: 1
```
Read the [upgrade notes](https://example.org/notes) first. Then a sentence is cut by the budget of the page"""
    shown = prepare.shown_text("a.rst", page)
    assert shown.startswith("# The Template Cache\n") and not re.search("currentmodule|===|`|class:|depth|https", shown)
    assert phrases_of("a.rst", page) == [
        "the Template Cache",
        "the Cache keeps templates that were compiled before, in the order of their last use, see jinja2.BytecodeCache",
        "it is cleared (e.g. after an upgrade) by a command",
        "read the upgrade notes first",
    ]


def test_outlines_have_whole_sentences_and_each_definition_once():
    code = '''class Cache:
    """Keeps what was compiled before, and forgets the
    oldest when there is no room for another.
    """
    def __init__(self, path): ...
    def load(self):
        """Reads it"""
        return a_call_of_a_function_with_a_long_name(self)
    def read(self): ...
    # The frame is compiled again when the template, or another that it
    # extends, was written since.
    def load(self, *args,
        *rest): ...
    """
TABLE = make_the_table_of_everything_that_is_kept(3)
def save(self): ...
    # Nothing is written where the disk is full
    # Another attempt is made later
''' + "x = 1\n" * 15
    assert prepare.shown_text("a.py", code).split("\n") == [
        "class Cache",
        '"""Keeps what was compiled before, and forgets the oldest when there is no room for another.',
        "def load",
        '"""Reads it"""',
        "def read",
        "# The frame is compiled again when the template, or another that it extends, was written since.",
        "def save",
        "# Nothing is written where the disk is full",
        "# Another attempt is made later",
    ]


def test_nothing_is_asked_about_licences_changes_and_what_a_program_wrote():
    silly = {
        "LICENSE": "Copyright 2014 Somebody\nUse in source form is permitted.",
        "COPYING.txt": "Copyright (c) Somebody.\nAll rights reserved.",
        "CHANGES.rst": "Version 3.1.3\n-------------\nFix a broken session cookie.",
        "HISTORY.md": "# History\n## [0.28.1] - 2024-12-06\nFix a broken session cookie.",
        "requirements.txt": "# This file is autogenerated by a tool",
        "uv.lock": "resolution markers = [",
        "make.bat": "REM Command file for documentation",
    }
    for name, text in silly.items():
        assert phrases_of(name, text) == [], name


def test_phrases_with_markup_are_not_asked_nor_what_another_file_says_over_two_lines():
    tree = {
        "a.md": "It needs no other library, no service and no account of anybody.\nSee https://example.org/the/manual",
        "b.txt": "So it is. " * 40 + "\nIt needs no other library, no service and no account of\nanybody.",
        "c.md": "Install a `compiler` or [a tool",
        "d.md": "Bring towels, soap,",
        "e.md": "pre-commit",
        "f.md": "Cold milk",
    }
    tasks = prepare.tasks_of_tree(tree, "any", "x", random.Random(0), 9)
    assert [task["targets"] for task in tasks] == [["f.md"]], tasks


def test_results_are_cut_by_lines_and_by_tokens_and_say_so():
    cut, mark = prepare.cut_text, prepare.CUT
    assert cut("a\nb", 2, 10) == "a\nb" and cut("a\nb\nc", 2, 10) == f"a\nb\n{mark}"
    for text in ("1 2 3 4 5 6 7 8", "word " * 500, "{" * 50, "\n" * 90, "é" * 70, "", "x" * 100_000):
        kept = cut(text, 8, 7)
        assert prepare.count_tokens(kept.removesuffix(mark).rstrip()) <= 7
        assert kept == text or kept.endswith(mark)


def test_any_directory_works(tmp_path, monkeypatch):
    """Also catches a file made of a directory that plays otherwise than the directory."""
    for repo in ("one", "two", "three", "four"):
        (tmp_path / repo / "docs").mkdir(parents=True)
        for i, word in enumerate(("apples", "pears", "plums", "cherries")):
            (tmp_path / repo / "docs" / f"{i}.md").write_text(f"# Growing {word} in {repo} orchards\n")
        (tmp_path / repo / "notes.txt").write_text(f"Sell {repo} baskets.")
    env = AutoExplore(repos=tmp_path)
    train, test = [{task["repo"] for task in env.tasks(split)} for split in ("train", "test")]
    assert train and test and not train & test and train | test <= {"one", "two", "three", "four"}
    assert {env.groups(task)[-1] for task in env.tasks("test")} == {"your own repository"}
    for name in ("mine.json", "mine.json.gz"):
        out = tmp_path.parent / name
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--repos", str(tmp_path), "--out", str(out)])
        prepare.main()
        made = AutoExplore(repos=out)
        assert (made.repos, made.all_tasks) == (env.repos, env.all_tasks)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--repos", str(tmp_path), "--out", f"{out}.json", "--test-only"])
    prepare.main()
    unseen = AutoExplore(repos=f"{out}.json")
    assert {task["repo"] for task in unseen.tasks("test")} == {"one", "two", "three", "four"}
    assert unseen.tasks("train") == unseen.tasks("valid") == []
    single = AutoExplore(repos=tmp_path / "one")  # one repository: split by question
    questions = [[task["question"] for task in single.tasks(split)] for split in ("train", "test")]
    assert all(questions) and not set(questions[0]) & set(questions[1])
    for i in range(3000):  # most of these are too many pages away
        (tmp_path / "four" / f"{i}.md").write_text(f"# Rule {i} of {'abcdefghij'[i % 10] * 4}{i}\n")
    env = AutoExplore(repos=tmp_path / "four")
    for task in env.tasks("train")[:40]:
        assert len(play(env, task, AutoExplore.expert_action)[1]) <= prepare.LONGEST_WAY
    (tmp_path / "empty").mkdir()
    for bad, words in (("empty", "too few text files"), ("missing", "No such file")):
        with pytest.raises(UserError, match=words):
            AutoExplore(repos=tmp_path / bad)


def test_fetched_trees_are_whole_and_stay_inside(tmp_path, monkeypatch):
    """Catches half a tree after a failure, pip's own file among the project's, and an archive that writes elsewhere."""
    fetch, bad = envs.beside("autoexplore/fetch.py"), "../../evil.txt"

    def download(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        name, version = command[-1].split("==")
        with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
            for path in ("README.md", "PKG-INFO", "src/a.py", *([bad] if name == "rich" else [])):
                archive.addfile(tarfile.TarInfo(f"{name}-{version}/{path}"))
        return subprocess.CompletedProcess(command, 0, "", "")

    out = tmp_path / "deep" / "real"
    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--out", str(out)])
    with pytest.raises(UserError, match="cannot unpack rich"):
        fetch.main()
    assert sorted(os.listdir(out)) == ["click", "flask", "httpx", "jinja2"]
    assert prepare.read_directory(out)["click"] == {"README.md": "[empty file]", "src": {"a.py": "[empty file]"}}
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **kwargs: failed)
    with pytest.raises(UserError, match="no source package of rich 15.0.0: ERROR: No matching distribution$"):
        fetch.main()
    assert not list(tmp_path.rglob("evil.txt")) and not (out / "rich").exists()


def test_files_of_ones_own_are_checked(tmp_path):
    """Catches a traceback for a wrong file, and for a question without `depth`."""
    path, tree = tmp_path / "mine.json", {"a.md": "text", "sub": {"b.md": "\u2028 \u0085"}}
    good = {"question": "Which one?", "targets": ["sub/b.md"], "repo": "any"}

    def read(task=None, tree=tree, text=None):
        path.write_text(text or json.dumps({"repos": {"any": tree}, "tasks": {"train": [good, task or good]}}))
        return prepare.read_file(str(path))

    assert read()["tasks"]["train"][1] == {**good, "depth": 1, "kind": "your own"}
    assert AutoExplore(repos=path).groups(AutoExplore(repos=path).tasks("train")[0])[0] == "depth 1"
    targets = [5, "../secret.txt", "/etc/passwd", "sub/../a.md", "link.txt", "", "sub", ".", "..", "sub/"]
    bad_tasks = [[1], {"question": "x"}, {**good, "repo": "other"}, {**good, "depth": "x"}, {**good, "question": ""}]
    bad_tasks += [{**good, "targets": [target]} for target in targets] + [{**good, "question": "\ud800"}]
    bad_entries = [{"..": {"x": "x"}}, {"a/b": "x"}, {"a": 3}, {"a": "\ud800"}, {"a": ["x"]}, {"": "x"}]
    bad_entries += [{"a\nb": "x"}, {"x" * 83: "x"}]
    bad_texts = ["{", "[]", '{"repos": 3, "tasks": {}}', '{"repos": {}, "tasks": {"train": 3}}', "[" * 100_000]
    for task in bad_tasks:
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(task)
    for entry in bad_entries:
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(tree=tree | entry)
    for text in bad_texts:
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(text=text)
    packed = gzip.compress(b"{}" * 1000)
    for content in (packed[:-20], b"plain", packed[:12] + b"\xff" * 20 + packed[30:]):
        (tmp_path / "mine.json.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot read repositories"):
            prepare.read_file(str(tmp_path / "mine.json.gz"))


# ---------------------------------------------------------------------------------------------------------
# Safety

ODD = ["with space.txt", "-rf.txt", "quo'te.txt", 'dou"ble.txt', "new\nline.txt", "tab\there.txt", "back\\slash.txt"]
ODD += ["🦉.txt", "back\\x5cslash.txt", "$(touch pwned).txt", "; rm x.txt", "a\u202eb.txt", "x" * 200 + ".txt"]


def test_odd_names_are_distinct_single_lines_and_playable(tmp_path):
    for name in ODD:
        (tmp_path / name).write_text("some text")
    raw = [b"caf\xe9.txt", b"caf\xea.txt", b"\xe9" * 255, b"\xe9" * 254 + b"a"] if sys.platform == "linux" else []
    for name in raw:
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write("some text")
    tree = prepare.read_directory(str(tmp_path))
    names = ODD + [os.fsdecode(name) for name in raw]
    assert sorted(tree) == sorted(map(show_name, names))
    env = env_of(tree)
    for name in tree:
        task = json.loads(json.dumps(task_for(name)))
        states, taken, info = play(env, task, AutoExplore.expert_action)
        assert info["success"] and max(map(len, states)) < 700
        assert all(state.replace("\n", "").isprintable() for state in states)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_names_are_unmistakable():
    """Catches two names that look alike, and one of 255 bytes that fills a prompt with 1,020 characters."""
    long = ["x" * 81, "x" * 82, "x" * 255, "y" * 81, "\udce9" * 255, "\udce9" * 254 + "a", "\n" * 255, "é " * 100]
    names = {*ODD, *long, *map(show_name, [*ODD, *long])}  # what is shown may be the name of another file
    shown = {show_name(name) for name in names}
    assert len(shown) == len(names)
    assert all(len(name) <= prepare.LONGEST_NAME + 2 and name.isprintable() for name in shown)
    assert show_name("a.txt") == "a.txt" and show_name("x" * 80) == "x" * 80
    assert prepare.suffix_of(show_name("x " * 90 + ".CSV")) == prepare.suffix_of(show_name("a b.csv")) == "csv"


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are Unicode")
def test_a_directory_whose_name_is_not_utf8(tmp_path):
    """Catches a crash of the random generator that takes the name as its seed, and a name that no terminal prints."""
    for name in (b"cafe", b"caf\xea", b"caf\xe9"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for i, word in enumerate((b"apples", b"pears", b"plums", b"cherries")):
            with open(os.path.join(folder, b"%d.md" % i), "wb") as file:
                file.write(b"# Growing " + word + b" in orchards\n")
    data = prepare.read(str(tmp_path))
    assert sorted(data["repos"]) == ['"caf\\xe9"', '"caf\\xea"', "cafe"]
    assert {task["repo"] for tasks in data["tasks"].values() for task in tasks} == set(data["repos"])
    assert list(prepare.read(os.fsdecode(folder))["repos"]) == ['"caf\\xe9"']


def test_nothing_outside_the_root_is_reachable(tmp_path):
    (tmp_path / "secret.txt").write_text("the secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "inside.txt").write_text("inside")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "linked_dir").symlink_to(tmp_path)
    (root / "sub" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / ".hidden").write_text("the secret")
    tree = prepare.read_directory(str(root))
    assert tree == {"inside.txt": "inside", "sub": {}}
    _, info = env_of(tree).reset(options={"task": task_for("inside.txt")})
    assert "cd .." not in info["actions"]


def test_binary_empty_huge_unreadable_and_special_files(tmp_path, monkeypatch):
    (tmp_path / "a_binary").write_bytes(b"\x7fELF\0\1\2")
    (tmp_path / "b_empty").write_text("")
    (tmp_path / "c_latin").write_bytes("Caf\xe9 und Stra\xdfe".encode("latin-1"))
    (tmp_path / "d_bom").write_bytes(b"\xef\xbb\xbfhello\r\nworld\x1b[31m")
    (tmp_path / "e_long").write_text("word " * 100_000)
    with open(tmp_path / "f_sparse", "wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "locked_dir").mkdir(mode=0)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    tree = prepare.read_directory(str(tmp_path))
    (tmp_path / "locked_dir").chmod(0o700)
    assert tree["a_binary"] == tree["f_sparse"] == "[binary file]" and tree["b_empty"] == "[empty file]"
    assert tree["c_latin"].startswith("Caf") and tree["d_bom"] == "hello\nworld [31m"
    assert len(tree["e_long"]) <= prepare.HEAD_BYTES + 10 and tree["e_long"].endswith(prepare.CUT)
    assert tree["locked_dir"] == {} and "pipe" not in tree
    assert len(prepare.shown_tree(tree)["e_long"]) < 400

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(prepare.os, "open", refuse)
    assert prepare.read_head(tmp_path / "a_binary") == "[unreadable file]"


def test_nothing_is_written_and_the_working_directory_stays(tmp_path):
    def snapshot():
        entries = []
        for folder, _, names in os.walk(tmp_path):
            for path in [folder, *(os.path.join(folder, name) for name in names)]:
                stat = os.lstat(path)
                entries.append((path, stat.st_mode, stat.st_size, stat.st_mtime_ns))
        return sorted(entries)

    write_tree(prepare.generate_tree(5), tmp_path)
    before, cwd = snapshot(), os.getcwd()
    env, rng = AutoExplore(repos=tmp_path), random.Random(0)
    for task in env.tasks("train")[:30]:
        play(env, task, at_random(rng), leave_out=0.3)
    assert snapshot() == before and os.getcwd() == cwd


def random_tree(rng, depth=0):
    """A tree with odd names and contents, empty directories, and directories of many files."""
    letters, tree = "ab.- '\"\\\n\t;$*é🦉\u202e\udcff\udce9", {}
    names = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.choice((0, 1, 3, 12)))} - {".", ".."}
    for name in sorted(map(show_name, names)):
        if depth < 4 and rng.random() < 0.3:
            tree[name] = random_tree(rng, depth + 1)
        else:
            tree[name] = "".join(rng.choices(letters + "\n" * 5, k=rng.choice((1, 10, 1000))))
    return tree


def test_random_walks_over_random_trees(monkeypatch):
    """Property test: whatever the tree, the menu is valid, the agent stays inside, states stay bounded."""
    monkeypatch.setattr(envs, "PAGE_ACTIONS", 9)
    rng = random.Random(0)
    for _ in range(150):
        env = env_of(prepare.shown_tree(random_tree(rng)))
        files = ["/".join(path) for path, _ in files_of(env.repos["any"])]
        if not files:
            continue
        task = task_for(rng.choice(files))
        states, _, _ = play(env, task, at_random(rng), shuffle=rng.random() < 0.5, leave_out=rng.choice((0.0, 0.5)))
        node = env.tree
        for name in env.cwd:
            node = node[name]
        assert isinstance(node, dict) and max(map(len, states)) < 3000
        env.horizon = 1000
        assert play(env, task, AutoExplore.expert_action)[2]["success"]


def test_large_and_deep_directories_load(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / "wide" / f"dir{i}").mkdir(parents=True)
        for j in range(100):
            (tmp_path / "wide" / f"dir{i}" / f"file{j}.txt").write_bytes(b"some words of text\n")
    tree = prepare.read_directory(tmp_path / "wide")
    assert sum(1 for _ in files_of(tree)) == 3000
    assert play(env_of(tree), task_for("dir5/file50.txt"), AutoExplore.expert_action)[2]["success"]
    monkeypatch.setattr(prepare, "MAX_FILES", 2999)
    with pytest.raises(UserError, match="more than 2999 files"):
        prepare.read_directory(tmp_path / "wide")
    deep = tmp_path.joinpath("deep", *["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("x")
    tree, depth = prepare.read_directory(tmp_path / "deep"), 0
    while tree:
        tree, depth = tree["d"], depth + 1
    assert depth == prepare.MAX_DEPTH + 1
