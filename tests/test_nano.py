"""The maker of the base LM: tokenizer, corpus, first heads, examination, and a tiny base made from nothing."""

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path

import maps
import pytest
import torch
from conftest import load_script
from transformers import AutoTokenizer

import envs
import negatives
import reflect_rl
from envs import UserError
from plumbing.words import spelt_words_of
from reflect_rl import LABELS

checks = envs.beside("../models/checks.py")

ROOT = Path(__file__).parent.parent
make = load_script("models/nano/make.py")


@pytest.fixture(scope="module")
def nano():
    return AutoTokenizer.from_pretrained(reflect_rl.NANO)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def test_tokenizer_keeps_grid_cells_apart():
    """Catches a map whose cells merge with their neighbours: every digit and punctuation mark is a token of its own."""
    state = envs.make("taxi").reset(options={"task": 3})[0]
    tokenizer = make.train_tokenizer([state] * 50 + ["row 10 column 100"] * 50, 400)
    joined = tokenizer.tokenize("|" + make.JOINED)[0].removeprefix("|")
    for text in (state, "row 10 column 100", "12:34|56"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        for token in tokenizer.convert_ids_to_tokens(ids):
            alone = len(token.removeprefix("Ġ").removesuffix(joined)) == 1
            assert alone or not any(c.isdigit() or c in "|:+-" for c in token), token
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("ünïcode → ok")["input_ids"]) == "ünïcode → ok"


def test_numbered_things_are_one_token_and_numbers_are_not():
    """Catches `cabinet 3` cut in two, and digits that merge with any other word or with a third digit."""
    text = "go to cabinet 3, then cabinet 12. row 3 of cabinet 123"
    tokens = make.train_tokenizer([text] * 50, 400, ("cabinet",)).tokenize(text)
    assert [token.removeprefix("Ġ") for token in tokens if "cabinet" in token] == ["cabinetĠ3", "cabinetĠ12", "cabinet"]
    assert "Ġrow" in tokens and tokens[-3:] == ["Ġ1", "2", "3"]


def test_a_word_has_the_same_tokens_wherever_it_stands():
    """Catches a word that cannot be found by comparing tokens, and text that does not come back as it was."""
    texts = [
        "about overview\nDirectory: /overview/x",
        'an overview: {"overview": 3}',
        "def my_overview(overview=1):\n    x = 2",
    ]
    tokenizer = make.train_tokenizer(texts * 50, 340)
    starts = ("an ", "/", "\n", '"', "my_", "3", "(")
    [word] = {tokenizer(f"{start}overview")["input_ids"][-1] for start in starts}
    assert all(tokenizer(text)["input_ids"].count(word) == text.count("overview") for text in texts)
    for text in [*texts, "a/b c.d\n  e\n\nf(g)h 3rd it's | : x"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# ---------------------------------------------------------------------------------------------------------
# Facts


def facts_of(name, env):
    return {beginning.strip(): rest.strip() for beginning, rest in make.game_of(name).describe(env)}


def test_facts_about_the_map_are_true():
    """Catches a corpus that teaches wrong coordinates: facts against the independent parser, at starts of all kinds."""
    env = envs.make("taxi")
    for task in range(0, 500, 7):
        state, _ = env.reset(options={"task": task})
        taxi, passenger, destination = maps.parse(state)
        facts = facts_of("taxi", env)
        assert facts["The taxi is at row"] == f"{taxi[0]} column {taxi[1]}."
        assert facts["The passenger is now"] == ("on board." if passenger is None else "waiting.")
        if envs.taxi_decode(task)[2] != envs.taxi_decode(task)[3]:  # else P covers D
            assert facts["The destination is at row"] == f"{destination[0]} column {destination[1]}."
        assert set(facts["Blocked:"].strip(".").split(", ")) == (maps.blocked(taxi) or {"nothing"})
        for direction in maps.DIRECTIONS:
            to = maps.neighbour(taxi, direction)
            assert facts[f"To move {direction}"] == (f"leads to row {to[0]} column {to[1]}." if to else "is blocked.")


def test_facts_about_the_last_action_are_true():
    """Catches a fact about the cell before that is about the cell now, and one that is there where nothing moved."""
    env = envs.make("taxi")
    for task in env.tasks("train")[:40]:
        state, info = env.reset(options={"task": task})
        before, rng = maps.parse(state), random.Random(task)
        for _ in range(12):
            action = rng.randrange(6)
            state, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
            facts, now = facts_of("taxi", env), maps.parse(state)
            assert facts["Before it the taxi was at row"] == f"{before[0][0]} column {before[0][1]}."
            assert facts["The last action was"] == f"{info['actions'][action]}."
            led = facts.get(f"To {info['actions'][action]} led")
            assert (led is None) == (action > 3)
            if led:
                goal = now[1] or now[2]
                distance = [abs(cell[0] - goal[0]) + abs(cell[1] - goal[1]) for cell in (before[0], now[0])]
                assert led.startswith("towards") == (distance[1] < distance[0])
            before = now


def test_facts_about_a_room_are_true():
    """Checked against the engine's own state, which the notes never read."""
    env, rng, checked, thing = envs.make("alfworld"), random.Random(0), 0, r"[a-z]+ \d+"
    for _ in range(40):
        make.random_walk(env, rng, 15)
        for beginning, rest in make.describe_household(env):
            sentence = beginning + rest
            assert "  " not in sentence and sentence.endswith(".")
            if match := re.fullmatch(rf"(?:[a-z]+ )*?({thing}) is in ({thing})\.", sentence):
                assert match[1] in env.house.contents[match[2]], sentence
                checked += 1
            if match := re.fullmatch(rf"On ({thing}) there is (.*)\.", sentence):
                assert sorted(env.house.contents[match[1]]) == sorted(re.findall(thing, match[2])), sentence
                checked += 1
    assert checked > 30


def test_facts_are_what_the_teacher_says():
    """Catches sentences of the teacher that the base LM has never met, and a sentence cut at another place."""
    env, rng, read = envs.make("autoexplore"), random.Random(0), 0
    for _ in range(40):
        make.random_walk(env, rng, 6)
        facts = make.describe_exploration(env)
        said = {beginning + rest for beginning, rest in facts}
        assert negatives.say_question(env) in said
        assert all(negatives.say_name(env, "On the way", f"{name}/") in said for name in env.cwd)
        if env.last[0] == "cat":
            assert said >= set(negatives.say_file(env))
            read += 1
        for beginning, rest in facts:
            assert re.search(r"( has| words| in| of|here:|yet:)$", beginning) and re.fullmatch(r" .*\.", rest)
    assert read > 10


def test_ones_own_environment_may_describe_itself(monkeypatch):
    """Catches a corpus that plays the shipped games only, and one that asks for `describe`."""
    plain = type("Plain", (envs.DangerousTaxi,), {})
    own = type("Own", (envs.DangerousTaxi,), {"describe": lambda self: [("It is", " mine.")]})
    for cls, facts in ((plain, []), (own, [("It is", " mine.")])):
        monkeypatch.setitem(envs.ENVS, "own", cls)
        assert make.game_of("own").describe(cls()) == facts
        [text] = make.corpus({"own": lambda actions: (LABELS, None)}, 0, range(1))
        assert ("It is mine." in text) == bool(facts)


# ---------------------------------------------------------------------------------------------------------
# Corpus


@pytest.fixture(scope="module")
def documents():
    return make.corpus({"taxi": lambda actions: (LABELS, None)}, 0, range(400))


def test_corpus_has_no_reflection(documents):
    """Catches teacher text in the base LM: then what SFT adds would not be SFT's."""
    said = r"# Analyze|Next goal: the|To (move \w+|pick up the passenger|drop off the passenger) was a mistake"
    for document in documents:
        assert not re.search(said + r"|Passenger (on board|waiting)\.", document), document


def test_corpus_has_no_expert_label(documents):
    """Catches expert actions in the base LM's text: the action taken is optimal as often as a fair die would have
    it."""
    expected, variance, optimal = 0.0, 0.0, 0
    for document in documents:
        rows = document.splitlines()[1:6]
        if not any("T" in row or "X" in row for row in rows):  # in `pickup` mode no play goes on after a pickup
            continue
        lines = re.search(r"# Actions:\n(.*)# Action:\n", document, re.S)[1].splitlines()
        menu = dict(line.split(" ", 1) for line in lines)
        label, good = document.split("# Action:\n")[1].splitlines()[0], maps.optimal(document)
        p = len(good) / len(menu)
        expected, variance, optimal = expected + p, variance + p * (1 - p), optimal + (menu[label] in good)
    assert variance > 30, "too few documents to tell"
    assert abs(optimal - expected) < 4.5 * variance**0.5, f"{optimal} optimal actions, {expected:.0f} by chance"


def test_corpus_menus_are_shuffled(documents):
    """Catches a base LM that learns "A is south" rather than "a label means its line"."""
    first = {re.search(r"# Actions:\nA (.*)\n", document)[1] for document in documents}
    assert first == set(maps.MENU)


def test_corpus_comes_from_no_valid_or_test_start():
    """Catches random play on test starts: a walk of length 0 shows the start itself. (`final` was cut from `train`.)"""
    env = envs.make("taxi")
    seen = {make.random_walk(env, random.Random(i), 0)[0] for i in range(300)}
    tasks = env.tasks("train") + env.tasks("final")
    allowed = {env.reset(options={"task": task, "mode": mode})[0] for task in tasks for mode in env.modes}
    assert seen <= allowed


def test_corpus_is_a_function_of_its_numbers():
    """Catches documents that depend on the order in which they are made: a resumed run would see others."""
    letters = {"taxi": lambda actions: (LABELS, None)}
    assert make.corpus(letters, 0, range(6))[3:] == make.corpus(letters, 0, range(3, 6))
    assert make.corpus(letters, 0, range(3)) != make.corpus(letters, 1, range(3))
    both = letters | {"autoexplore": letters["taxi"]}
    asks = ["Question: " in document for document in make.corpus(both, 0, range(6))]
    assert asks == [False, True, True] * 2, "AutoExplore has two turns"


def test_corpus_is_what_it_was(capsys):
    """Catches a draw more or less, and one other word: 60 documents of all games, twice, by their hash."""
    with pytest.raises(SystemExit) as end:
        make.check()
    assert end.value.code == 0, capsys.readouterr().out


def test_corpus_repositories_are_for_training_and_mostly_new():
    """Catches test repositories in the corpus, and words that come up again and again: they are learned by heart."""
    env, rng = envs.make("autoexplore"), random.Random(0)
    held_out = {task["repo"] for split in ("valid", "test") for task in env.tasks(split)}
    shipped = set(env.repos)
    names = [make.exploration_task(env, rng)["repo"] for _ in range(100)]
    new = [name for name in names if re.match(r"reworded:|generated:\d{5}", name)]
    assert 50 < len(new) == len(set(new)) < 90
    assert not {name.rpartition(":")[2] for name in names} & held_out and not set(names) & held_out
    assert set(envs.make("autoexplore").repos) == shipped, "they belong to every environment"


def test_questions_asked_in_passing_are_about_what_is_near():
    """Catches a question of another repository, one whose target is the old one, and words from nowhere."""
    env, rng = envs.make("autoexplore"), random.Random(0)
    pool = {(task["repo"], task["question"]): task["targets"] for task in make.training_pool()[1]}
    real = made_up = 0
    for _ in range(120):
        make.random_walk(env, rng, 6)
        repo = env.task["repo"]
        make.ask_near(env, rng)
        assert env.task["repo"] == repo and env.render().startswith(f"Question: {env.question}\n")
        if (repo, env.question) in pool:
            real += 1
            assert {"/".join(target) for target in env.targets} == set(pool[repo, env.question])
        else:
            made_up += 1
            tree = make.tree_of(repo)
            words = " ".join(f"{' '.join(path)} {text} {env.render()}" for path, text in envs.files_of(tree))
            assert set(negatives.asked(env)) <= set(spelt_words_of(words))
    assert real > 15 and made_up > 30


def test_copying_comes_first(nano):
    """Catches documents before copying is known, no copying among them, batches that a resumed run sees anew, and a
    loss on the state, which is random."""
    args = argparse.Namespace(seed=0, batch=4, copy_steps=2)
    labels = make.labels_of(["taxi", "autoexplore"], nano)
    batches = [make.batch_at(step, labels, nano, args) for step in range(4)]
    copies = [[prompt == completion for prompt, completion in batch] for batch in batches]
    assert copies == [[True] * 16] * 2 + [[True] * 2 + [False] * 4] * 2
    for prompt, completion in batches[3][2:]:
        state, rest = map(nano.decode, (prompt, completion[:-1]))
        assert state.endswith("\n# Facts:\n") and (state + rest).count("# Action:\n") == 1
        assert completion[-1] == nano.eos_token_id
    assert make.batch_at(3, labels, nano, args) == batches[3] != batches[2]


# ---------------------------------------------------------------------------------------------------------
# Model


@pytest.mark.parametrize("width", [64, 128])
def test_first_heads_start_by_looking_back(width):
    """Catches a rotation the wrong way round, or queries and keys of other heads."""
    torch.manual_seed(0)
    model = make.new_base(64, width, 2).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.randint(64, (2, 400)), output_attentions=True).attentions[0]  # (B, heads, T, T)

    def shares(head):  # of the attention, by how far back
        return [weights[:, head].diagonal(-back, 1, 2)[:, 300:].mean().item() for back in range(90)]

    before, window = shares(0), shares(1)
    assert before[1] > 0.8 and before[1] > 10 * max(before[0], *before[2:]), before[:5]
    assert sum(window[:4]) > 0.9 and min(window[:4]) > 0.1, window[:8]


def test_optimizers_hold_every_parameter_once():
    model = make.new_base(64, 64, 2)
    held = [p for o in make.optimizers_of(model, 0.02) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


# ---------------------------------------------------------------------------------------------------------
# Examination


class Fake(torch.nn.Module):
    """A model whose logits are what `mark(logits, ids)` makes of zeros."""

    device = torch.device("cpu")

    def __init__(self, size, mark):
        super().__init__()
        self.size, self.mark = size, mark

    def forward(self, ids, use_cache=False):
        logits = torch.zeros(*ids.shape, self.size)
        self.mark(logits, ids)
        return argparse.Namespace(logits=logits)


def test_facts_are_tokenized_behind_their_prompt(nano):
    """Catches an exam whose right answers cannot be given: the fact's rest must be what follows in the whole text."""
    prompt, rest = "State.\n# Facts:\nThe taxi is at row", " 2 column 3."
    before, behind = make.encode_behind(nano, prompt, rest)
    assert behind and before == reflect_rl.encode(nano, prompt)
    assert before + behind == reflect_rl.encode(nano, prompt + rest)


def test_reading_accuracy_is_measured(nano):
    """Catches an exam that everybody passes, or nobody: a model that predicts the true next token wherever the fact is
    about the passenger gets exactly these facts right."""

    def knows_the_passenger(logits, ids):
        for row, text in enumerate(nano.batch_decode(ids)):
            if re.search(r"(on board|waiting)\.", text):
                logits[row, range(ids.shape[1] - 1), ids[row, 1:]] = 1.0

    shares = make.reading_accuracy(Fake(len(nano), knows_the_passenger), nano, "taxi", states=4)
    assert shares.pop("The passenger is now") == (4, 4)
    assert shares and not any(right for right, _ in shares.values())


def test_labels_are_examined(nano):
    """Catches an exam of another position: a model that always says B behind the header is right on one of two
    documents; one that names no action, or a verb that several begin with, is not asked about."""
    b = nano("\nB")["input_ids"][-1]

    def says_b(logits, ids):
        logits[..., b] = 1.0

    documents = []
    for fact, label in (("Now: go x.", "A"), ("Now: go y.", "B"), ("Then.", "B"), ("Now: go.", "B")):
        documents.append(f"A is\n{fact}\n# Actions:\nA go x\nB go y\n# Action:\n{label}\nz")
    assert make.label_accuracy(Fake(len(nano), says_b), nano, documents) == (1, 2)


# ---------------------------------------------------------------------------------------------------------
# Training


def run_maker(monkeypatch, out, *options):
    tiny = ["--device", "cpu", "--width", "32", "--layers", "1", "--batch", "2", "--copy-steps", "2", "--steps", "6"]
    words = ["make.py", "--out", str(out), "--corpus-envs", "taxi,alfworld", "--vocabulary", "400", *tiny, *options]
    monkeypatch.setattr(sys, "argv", words)
    make.main()


@pytest.fixture
def quick(monkeypatch):
    """Less of everything that takes time."""
    corpus, examine = make.corpus, make.examine
    monkeypatch.setattr(make, "corpus", lambda labels, seed, numbers: corpus(labels, seed, list(numbers)[:8]))
    monkeypatch.setattr(make, "examine", lambda *args: examine(*args, documents=8, states=2))
    monkeypatch.setattr(make, "SAVE_EVERY", 2)


def test_a_base_is_made_from_nothing_and_resumed(tmp_path, monkeypatch, capsys, quick):
    """A loadable LM with a finite loss. Killed in the fifth update, the same command ends with the same weights."""
    run_maker(monkeypatch, tmp_path / "whole")
    out = capsys.readouterr().out
    model, tokenizer = reflect_rl.load_base(tmp_path / "whole")
    assert len(tokenizer) == model.config.vocab_size == 400
    assert 0 < float(out.split("held-out loss ")[1].split()[0]) < math.log(400) + 1
    assert "taxi" in (tmp_path / "whole" / "words.txt").read_text().split()
    assert "The taxi is at row" in out, "what the LM can read is not reported"
    batch_at = make.batch_at

    def dying(step, *args):
        if step == 4:
            raise KeyboardInterrupt
        return batch_at(step, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make, "batch_at", dying)
        run_maker(patch, tmp_path / "killed")
    torch.manual_seed(99)
    with pytest.raises(UserError, match="other options"):
        run_maker(monkeypatch, tmp_path / "killed", "--lr", "0.1")
    run_maker(monkeypatch, tmp_path / "killed")
    names = ["model.safetensors", "tokenizer.json", "config.json"]
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    with pytest.raises(UserError, match="another --out"):
        run_maker(monkeypatch, tmp_path / "whole")


def test_an_odd_width_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="multiple of 32"):
        run_maker(monkeypatch, tmp_path / "odd", "--width", "48")
    assert not list(tmp_path.iterdir())


def test_the_shipped_base_is_examined(monkeypatch, capsys, quick):
    """Catches tables that need a training run: `--examine` alone reads the shipped LM, which reads maps without
    fail."""
    monkeypatch.setattr(sys, "argv", ["make.py", "--examine", "--device", "cpu", "--corpus-envs", "taxi"])
    make.main()
    assert re.search(r"The taxi is at row +100.0% of 2", capsys.readouterr().out)


def test_many_words_that_the_base_never_met_are_named(tmp_path, capsys):
    """Catches a line for environments whose words it knows, none where it does not, and one about a base of which
    nobody knows what it has read."""
    for name in ("taxi", "alfworld", "corridor:Corridor"):
        checks.say_strange_words(envs.make(name), "nano")
    checks.say_strange_words(envs.make("examples.key_door:KeyDoor"), tmp_path)
    assert capsys.readouterr().out == ""
    checks.say_strange_words(envs.make("examples.key_door:KeyDoor"), "nano")
    assert "note: 42% of the different words in KeyDoor's states" in capsys.readouterr().out


def test_the_card_and_the_guards_are_there():
    """Catches a model without its card, and a `--check` that has nothing to compare with."""
    assert "make.py --check" in (ROOT / "models" / "nano" / "README.md").read_text(encoding="utf-8")
    assert sum("nano corpus" in guard for guard in json.loads((ROOT / "tests" / "guards.json").read_text())) == 2
