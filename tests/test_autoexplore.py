"""AutoExplore: the contract, safety, and tasks that can be solved and are what they claim."""

import itertools
import json
import os
import random
import re
import sys

import pytest

import envs
import negatives
from envs import CUT, AutoExplore, UserError, cut_text, files_of, generate_tree, read_tree, show_name, stems_of
from negatives import GOALS, reflect_on_exploration, write_tasks

SPLITS = ("train", "valid", "test", "valid_seen", "test_seen")


def play(env, task, choose, **options):
    """One episode, checking the contract at every step: `(states, actions taken, last info)`."""
    state, info = env.reset(seed=1, options={"task": task} | options)
    states, taken, over = [state], [], False
    while not over:
        assert info["actions"] and len(set(info["actions"])) == len(info["actions"]) <= env.page_size[0]
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


def task_for(root, target, question="Which file explains the thing?"):
    return {"question": question, "targets": [target], "root": str(root)}


def snapshot(root):
    """Names, kinds, sizes and times of modification of all that is under a directory."""
    entries = []
    for folder, _, names in os.walk(root):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            stat = os.lstat(path)
            entries.append((path, stat.st_mode, stat.st_size, stat.st_mtime_ns))
    return sorted(entries)


# The episode.


def test_expert_succeeds_along_the_stated_path():
    env = AutoExplore()
    for split in SPLITS:
        for task in sample(env.tasks(split), 150):
            _, taken, info = play(env, task, AutoExplore.expert_action)
            assert info["success"] and taken == task["path"], task
            assert task["depth"] == task["targets"][0].count("/")


def test_expert_recovers_from_mistakes_and_within_small_pages():
    env, rng = AutoExplore(max_actions=5, horizon=60), random.Random(0)
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
    with pytest.raises(RuntimeError):
        env.step(0)


def test_horizon_truncates_and_a_file_is_read_once():
    env = AutoExplore()
    task = next(task for task in env.tasks("train") if task["depth"] == 2)
    rng = random.Random(0)

    def wander(env):
        return rng.choice([i for i, (verb, _) in enumerate(env.moves) if verb != "id"])

    _, taken, info = play(env, task, wander)
    assert len(taken) == env.horizon and not info["success"]
    env.reset(options={"task": task})
    name = next(name for verb, name in env.moves if verb == "cat")
    env.step(env.moves.index(("cat", name)))
    assert ("cat", name) not in env.moves and ("id", name) in env.moves


def test_pages_show_every_entry_exactly_once(tmp_path):
    for i in range(40):
        (tmp_path / f"file{i:02}.txt").write_text(f"number {i}")
    for i in range(9):
        (tmp_path / f"dir{i}").mkdir()
    env = AutoExplore(max_actions=8)
    _, info = env.reset(options={"task": task_for(tmp_path, "file31.txt")})
    first, shown = info["actions"], []
    while True:
        assert len(info["actions"]) <= 8
        shown += [action for action in info["actions"] if action != "more"]
        _, _, _, _, info = env.step(info["actions"].index("more"))
        env.steps = 0
        if info["actions"] == first:
            break
    assert len(shown) == len(set(shown)) == 9 + 2 * 40
    while not env.success:
        env.step(env.expert_action())


def test_pages_have_a_limit_of_characters():
    """Bug: a package's long names, each several times in a prompt, exceed the context. No name is split or lost."""
    names = [f"{'long_name_' * (i % 5)}{i}.py" for i in range(30)] + ["x" * 200]
    pages = envs.pages_of(dict.fromkeys(names, "text"), (), max_actions=100, max_chars=160)
    assert sorted(name for page in pages for name in page) == sorted(names)
    assert all(sum(map(len, page)) <= 160 or page == ["x" * 200] for page in pages) and 3 < len(pages) < 10
    full = [sum(map(len, page)) + len(after[0]) for page, after in zip(pages, pages[1:], strict=False)]
    assert all(chars > 160 for chars in full), "a page is begun although the last one has room"


def test_results_are_cut_by_lines_and_by_tokens_and_say_so():
    assert cut_text("a\nb", 2, 10) == "a\nb"
    assert cut_text("a\nb\nc", 2, 10) == f"a\nb\n{CUT}"
    assert cut_text("x" * 100_000, 8, 10).endswith(CUT)
    for text in ("1 2 3 4 5 6 7 8", "word " * 500, "{" * 50, "\n" * 90, "é" * 70, ""):
        kept = cut_text(text, 8, 7)
        assert envs.count_tokens(kept.removesuffix(CUT).rstrip()) <= 7
        assert kept == text or kept.endswith(CUT)
    assert cut_text("abcdef", 8, 3, count=len) == f"abc\n{CUT}"


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


def test_states_menus_and_reflections_are_short():
    """What a small model with a context of a few hundred tokens can read."""
    env, rng = AutoExplore(), random.Random(0)
    for task in sample(env.tasks("train") + env.tasks("test"), 200):
        state, info = env.reset(options={"task": task})
        mistake = over = False
        while not over:
            reflection = reflect_on_exploration(env, mistake)
            assert reflection.endswith(tuple(GOALS.values())) and "\n" not in reflection
            assert env.actions[env.expert_action()] not in reflection  # the decision is the policy's
            assert envs.count_tokens(reflection) <= 110 and envs.count_tokens(state) <= 150
            assert all(beginning and rest.endswith(".") for beginning, rest in env.describe())
            mistake = bool(env.mistakes()) and rng.random() < 0.3
            action = rng.choice(env.mistakes()) if mistake else env.expert_action()
            state, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated


# Tasks.


def test_invented_repositories_have_no_word_of_held_out_themes():
    """Catches words of the themes of `valid` and `test` in training repositories, one vocabulary for all invented
    repositories, and invented test tasks."""

    def names(seeds):
        return {
            word
            for seed in seeds
            for path, text in envs.files_of(envs.generate_tree(seed))
            for word in re.findall("[a-z]+", f"{' '.join(path)} {text}".lower())
        }

    themes = envs.vocabulary()["themes"]
    held_out = [
        name
        for split in ("valid", "test")
        for theme in themes[split].values()
        for d, t in theme.items()
        for name in (d, *t)
    ]
    invented = names(range(envs.INVENTED, envs.INVENTED + 40))
    assert len(invented) > 2000 and len(held_out) > 60 and not invented & set(held_out)
    everywhere = names(range(3))
    one, other = names([envs.INVENTED]) - everywhere, names([envs.INVENTED + 1]) - everywhere
    assert len(one) > 60 and len(one & other) < 10, one & other
    env = AutoExplore()
    for split in SPLITS:
        roots = {task["root"] for task in env.tasks(split)}
        invented = {root for root in roots if root.startswith("generated:") and int(root[10:]) >= envs.INVENTED}
        assert bool(invented) == (split in ("train", "valid_seen", "test_seen"))


def test_mistakes_where_the_answer_is_are_near_misses():
    """Catches teacher data that rarely read a wrong file: the reflector then says that every file has the answer."""
    env, near = AutoExplore(), 0
    for task in sample(env.tasks("train"), 40):
        env.reset(options={"task": task})
        for text in task["path"][:-1]:
            found = [env.moves[i] for i in env.mistakes()]
            expert = env.moves[env.expert_action()]
            assert expert not in found and all(verb != "id" for verb, _ in found)
            others = [move for move in env.moves if move[0] == "cat" and move != expert]
            if expert[0] == "cat" and others:
                assert found == others
                near += 1
            env.step(env.actions.index(text))
        assert env.mistakes() == []
    assert near > 25
    records = negatives.make_records(AutoExplore, 100, 1.0, seed=0)
    misses = [r for r in records if "that is the wrong file" in r.reflection and "read a file here" in r.reflection]
    assert len(misses) > 0.03 * len(records), "and they must be made"


def test_questions_asked_in_passing_are_about_what_is_near():
    """Catches a question of another repository or split, one whose target is the old, and words from nowhere."""
    env, rng = AutoExplore(), random.Random(0)
    training = {(task["root"], task["question"]): task["targets"] for task in env.tasks("train")}
    inside = real = made_up = read = 0
    for _ in range(180):
        negatives.random_walk(env, rng, 6)
        root, cwd = env.task["root"], "".join(f"{name}/" for name in env.cwd)
        read -= env.last[0] == "cat"
        env.ask_here(rng)
        read += env.last[0] == "cat"
        assert env.task["root"] == root and env.render().startswith(f"Question: {env.question}\n")
        if (root, env.question) in training:
            real += 1
            assert {"/".join(target) for target in env.targets} == set(training[root, env.question])
            inside += bool(cwd) and env.task["targets"][0].startswith(cwd)
        else:
            made_up += 1
            everything = " ".join(f"{' '.join(path)} {text} {env.render()}" for path, text in files_of(env.tree))
            assert set(env.asked()) <= set(envs.spelt_words_of(everything))
    assert real > 20 and inside > 10 and made_up > 40 and read > 20


def test_training_is_on_training_repositories_and_on_new_ones(tmp_path):
    """Catches test repositories in corpus or teacher data, too few words (they would be learned by heart), and other
    repositories than the user's, who gave questions."""
    env, rng = AutoExplore(), random.Random(0)
    training = {task["root"] for task in env.tasks("train")}
    roots = [env.training_task(rng)["root"] for _ in range(100)]
    new = [root for root in roots if root not in training]
    assert 50 < len(new) == len(set(new)) < 90
    reworded = [root.split(":")[2] for root in new if root.startswith("reworded:")]
    assert len(reworded) > 15 and set(reworded) == {root for root in training if ":" not in root}
    made_up = [int(root.removeprefix("generated:")) for root in new if root.startswith("generated:")]
    assert len(made_up) > 25 and all(envs.split_of_seed(seed) == "train" for seed in made_up)
    own = AutoExplore(questions=tmp_path / "own.jsonl")
    write_tasks(env.tasks("train")[:10], tmp_path / "own.jsonl")
    assert {own.training_task(rng)["root"] for _ in range(20)} <= training
    used = []
    env.reset = lambda reset=env.reset, **how: used.append(how["options"]["task"]["root"]) or reset(**how)
    negatives.make_records(lambda: env, 30, 0.5, 0)
    assert 10 < len(set(used) - training) < 29


def test_a_reworded_repository_is_the_same_in_other_words():
    """Catches words left as they are (they would be learned by heart), words of one family torn apart, other endings of
    file names, and code that is none any more."""
    tree, other = envs.tree_of("chess_club"), envs.tree_of("reworded:0:chess_club")
    assert other == envs.tree_of("reworded:0:chess_club") != envs.tree_of("reworded:1:chess_club")
    files, others = list(files_of(tree)), list(files_of(other))
    endings = [sorted(path[-1].rpartition(".")[2] for path, _ in part) for part in (files, others)]
    assert endings[0] == endings[1]
    texts = [" ".join(" ".join([*path, text]) for path, text in part) for part in (files, others)]
    kept = set(envs.words_of(texts[0])) & set(envs.words_of(texts[1])) - envs.KEPT
    assert len(kept) < 10 and len(envs.words_of(texts[0])) == len(envs.words_of(texts[1]))
    assert texts[1].count("def ") == texts[0].count("def ") > 2
    families = [len(envs.stems_of(text)) for text in texts]
    assert abs(families[0] - families[1]) < 0.05 * families[0]
    for root in ("reworded:0:..", "reworded:0:no_such_repository", "reworded:x:chess_club"):
        with pytest.raises(UserError, match="no repository"):
            envs.tree_of(root)


def test_splits_are_disjoint_by_repository_and_by_question():
    env = AutoExplore()
    roots = {split: {task["root"] for task in env.tasks(split)} for split in SPLITS}
    for one, other in itertools.combinations(("train", "valid", "test"), 2):
        assert roots[one].isdisjoint(roots[other])
    assert roots["test_seen"] <= roots["train"] and roots["valid_seen"] <= roots["train"]
    keys = [(task["root"], task["question"]) for split in SPLITS for task in env.tasks(split)]
    assert len(keys) == len(set(keys))
    for split in ("train", "test"):
        assert {task["depth"] for task in env.tasks(split)} == {0, 1, 2, 3}
    assert AutoExplore().tasks("train") == env.tasks("train")
    with pytest.raises(UserError, match="unknown split"):
        env.tasks("tests")


def test_themes_of_test_repositories_are_in_no_training_repository():
    words = {}
    for split, themes in envs.vocabulary()["themes"].items():
        words[split] = {word for theme in themes.values() for d, things in theme.items() for word in (d, *things)}
    assert words["train"].isdisjoint(words["test"]) and words["train"].isdisjoint(words["valid"])
    for seed in range(30):
        directories = {name for path, _ in files_of(generate_tree(seed)) for name in path[:-1]}
        assert directories <= words[envs.split_of_seed(seed)] | set(envs.vocabulary()["places"])


def test_a_question_has_one_answer_and_does_not_name_it():
    env = AutoExplore()
    for task in sample(env.tasks("train"), 300) + sample(env.tasks("test"), 100):
        (target,) = task["targets"]
        name = target.split("/")[-1]
        assert name.lower() not in task["question"].lower()
        spoken = f" {' '.join(''.join(c if c.isalpha() else ' ' for c in task['question'].lower()).split())} "
        given = " ".join("".join(c if c.isalpha() else " " for c in name.rpartition(".")[0].lower()).split())
        assert f" {given} " not in spoken, task
        able = [
            "/".join(path)
            for path, text in files_of(envs.tree_of(task["root"]))
            if stems_of(task["question"]) <= stems_of(" ".join([cut_text(text), *path[:-1]]))
        ]
        assert able == [target], task  # alone among all files, what is shown of it and its path have all the words


def test_rules_ask_about_every_kind_of_file():
    def phrases(name, text):
        return [f"{verb} {phrase}" for _, verb, phrase in envs.facts_of(name, text)]

    assert "explains shipping abroad" in phrases("a.md", "# Shipping abroad\nParcels take a week.")
    assert "says: parcels take a week" in phrases("a.md", "# Shipping abroad\nParcels take a week.")
    assert "gives the price of Green tea" in phrases("a.csv", "tea,price\nGreen tea,3")
    assert "sets the fee of late return" in phrases("a.json", '{\n  "late_return": {\n    "fee": 3\n  }\n}')
    assert "sets the fee of late return" in phrases("a.yaml", "late_return:\n  fee: 3")
    assert "defines parse chip" in phrases("a.py", '"""Read the chip."""\ndef parse_chip(line): ...')
    assert "says: read the chip" in phrases("a.py", '"""Read the chip."""\ndef parse_chip(line): ...')
    assert phrases("a.md", "[binary file]") == phrases("a.csv", "") == []


def test_jsonl_survives_and_a_bad_line_is_named(tmp_path):
    file = tmp_path / "tasks.jsonl"
    tasks = AutoExplore(generated=0).tasks("train")[:20]
    write_tasks(tasks, file)
    assert envs.read_tasks(file) == tasks
    env = AutoExplore(questions=str(file))
    parts = [env.tasks(split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [14, 4, 2]
    for bad in (
        "{",
        "[1]",
        '{"question": "x"}',
        json.dumps(tasks[0] | {"targets": ["nowhere.md"]}),
        json.dumps(tasks[0] | {"root": "../secrets"}),
    ):
        file.write_text(json.dumps(tasks[0]) + "\n" + bad + "\n")
        with pytest.raises(UserError, match="line 2"):
            envs.read_tasks(file)


def test_any_directory_works(tmp_path):
    for repo in ("one", "two", "three", "four"):
        (tmp_path / repo / "docs").mkdir(parents=True)
        for i, word in enumerate(("apples", "pears", "plums", "cherries")):
            (tmp_path / repo / "docs" / f"{i}.md").write_text(f"# Growing {word} in {repo} orchards\n")
        (tmp_path / repo / "notes.txt").write_text(f"Sell {repo} baskets.")
    env = AutoExplore(repos=str(tmp_path))
    roots = [{task["root"] for task in env.tasks(split)} for split in ("train", "test")]
    assert roots[0] and roots[1] and not roots[0] & roots[1]
    assert {env.groups(task)[-1] for task in env.tasks("test")} == {"your own repository"}
    single = AutoExplore(repos=str(tmp_path / "one"))  # one repository: split by question
    questions = [[task["question"] for task in single.tasks(split)] for split in ("train", "test")]
    assert all(questions) and not set(questions[0]) & set(questions[1])
    for i in range(3000):  # most of these are too many pages away
        (tmp_path / "four" / f"{i}.md").write_text(f"# Rule {i} of {'abcdefghij'[i % 10] * 4}{i}\n")
    assert all(len(task["path"]) <= 10 for task in AutoExplore(repos=str(tmp_path / "four")).tasks("train"))
    (tmp_path / "empty").mkdir()
    for bad in ("empty", "missing"):
        with pytest.raises(UserError):
            AutoExplore(repos=str(tmp_path / bad)).tasks("train")


# Safety.

ODD = [
    "with space.txt",
    "-rf.txt",
    "quo'te.txt",
    'dou"ble.txt',
    "new\nline.txt",
    "tab\there.txt",
    "back\\slash.txt",
    "🦉.txt",
    "back\\x5cslash.txt",
    "$(touch pwned).txt",
    "; rm x.txt",
    "a\u202eb.txt",
    "x" * 200 + ".txt",
]


def test_odd_names_are_distinct_single_lines_and_playable(tmp_path):
    for name in ODD:
        (tmp_path / name).write_text("some text")
    raw = []
    if sys.platform == "linux":
        raw = [b"caf\xe9.txt", b"caf\xea.txt"]
        for name in raw:
            with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
                file.write("some text")
    names = sorted(read_tree(str(tmp_path)))
    assert names == sorted(ODD + [os.fsdecode(name) for name in raw])
    assert len({show_name(name) for name in names}) == len(names)
    env = AutoExplore()
    for name in names:
        task = json.loads(json.dumps(task_for(tmp_path, name)))
        states, taken, info = play(env, task, AutoExplore.expert_action)
        assert info["success"] and all(state.isascii() or state.encode() for state in states)
    assert sorted(os.listdir(tmp_path)) == names


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
    assert read_tree(str(root)) == {"inside.txt": "inside", "sub": {}}
    env = AutoExplore()
    for target in (5, "../secret.txt", "/etc/passwd", "sub/../inside.txt", "link.txt", "", "sub", ".", "..", ".hidden"):
        with pytest.raises(UserError):
            env.reset(options={"task": task_for(root, target)})
    for name in ("..", ".", "../..", "repos/../..", "coffee_company/..", "generated:x", "generated:-1", ""):
        with pytest.raises(UserError):
            env.reset(options={"task": task_for(name, "envs.py")})
    _, info = env.reset(options={"task": task_for(root, "inside.txt")})
    assert "cd .." not in info["actions"]


def test_binary_empty_huge_unreadable_and_special_files(tmp_path):
    (tmp_path / "a_binary").write_bytes(b"\x7fELF\0\1\2")
    (tmp_path / "b_empty").write_text("")
    (tmp_path / "c_latin").write_bytes("Caf\xe9 und Stra\xdfe".encode("latin-1"))
    (tmp_path / "d_bom").write_bytes(b"\xef\xbb\xbfhello\r\nworld\x1b[31m")
    (tmp_path / "e_long").write_text("word " * 100_000)
    with open(tmp_path / "f_sparse", "wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "g_locked").write_text("locked")
    (tmp_path / "g_locked").chmod(0)
    (tmp_path / "locked_dir").mkdir(mode=0)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    tree = read_tree(str(tmp_path))
    (tmp_path / "locked_dir").chmod(0o700)
    assert tree["a_binary"] == tree["f_sparse"] == "[binary file]" and tree["b_empty"] == "[empty file]"
    assert tree["c_latin"].startswith("Caf") and tree["d_bom"] == "hello\nworld [31m"
    assert len(tree["e_long"]) <= envs.HEAD_BYTES + 10 and tree["e_long"].endswith(CUT)
    assert tree["g_locked"] in ("[unreadable file]", "locked")  # root may read everything
    assert tree["locked_dir"] == {} and "pipe" not in tree
    env = AutoExplore()
    for name, text in tree.items():
        if isinstance(text, str):
            assert play(env, task_for(tmp_path, name), AutoExplore.expert_action)[2]["success"]


def test_unreadable_is_a_note_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(envs.os, "open", refuse)
    assert envs.read_directory(str(tmp_path), 3, itertools.count()) == {"a.txt": "[unreadable file]"}


def test_nothing_is_written_and_the_working_directory_stays(tmp_path):
    for path, text in files_of(generate_tree(5)):
        (tmp_path / "/".join(path[:-1])).mkdir(parents=True, exist_ok=True)
        (tmp_path / "/".join(path)).write_text(text)
    before, cwd = snapshot(tmp_path), os.getcwd()
    env, rng = AutoExplore(repos=str(tmp_path)), random.Random(0)
    for task in env.tasks("train")[:30]:
        play(env, task, at_random(rng), leave_out=0.3)
    assert snapshot(tmp_path) == before and os.getcwd() == cwd


def random_tree(rng, depth=0):
    """A tree with odd names and contents, empty directories, and directories of many files."""
    letters = "ab.- '\"\\\n\t;$*é🦉\u202e\udcff\udce9"
    names = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.choice((0, 1, 3, 12)))} - {".", ".."}
    return {
        name: random_tree(rng, depth + 1)
        if depth < 4 and rng.random() < 0.3
        else "".join(rng.choices(letters + "\n" * 5, k=rng.choice((1, 10, 1000))))
        for name in sorted(names)
    }


def test_random_walks_over_random_trees(monkeypatch):
    """Property test: whatever the tree, the menu is valid, the agent stays inside, states stay bounded."""
    rng, env, tree = random.Random(0), AutoExplore(max_actions=9), {}
    monkeypatch.setattr(envs, "tree_of", lambda root: tree)
    for _ in range(150):
        tree = random_tree(rng)
        files = ["/".join(path) for path, _ in files_of(tree)]
        if not files:
            continue
        task = task_for("any", rng.choice(files))
        states, _, _ = play(env, task, at_random(rng), shuffle=rng.random() < 0.5, leave_out=rng.choice((0.0, 0.5)))
        node = tree
        for name in env.cwd:
            node = node[name]
        assert isinstance(node, dict) and max(map(len, states)) < 3000
        env.reset(options={"task": task})
        env.horizon = 1000
        while not env.done:
            env.step(env.expert_action())
        env.horizon = 15
        assert env.success


def test_ten_thousand_files_load(tmp_path):
    for i in range(100):
        (tmp_path / f"dir{i}").mkdir()
        for j in range(100):
            (tmp_path / f"dir{i}" / f"file{j}.txt").write_bytes(b"some words of text\n")
    tree = read_tree(str(tmp_path))
    assert sum(1 for _ in files_of(tree)) == 10_000 and read_tree(str(tmp_path)) is tree
    assert play(AutoExplore(), task_for(tmp_path, "dir5/file50.txt"), AutoExplore.expert_action)[2]["success"]


def test_a_deep_tree_does_not_overflow(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("x")
    tree, depth = read_tree(str(tmp_path)), 0
    while tree:
        tree, depth = tree["d"], depth + 1
    assert depth == envs.MAX_DEPTH + 1
