"""The maker of the shipped base LM: tokenizer, corpus, a small Llama from nothing, its examination.

The corpus is text about the three games: a state met in RANDOM play, plain facts about it, a shuffled menu, a random
action, what it did. No expert action and no reflection is in it, so that what SFT and RL add is theirs. README.md
beside this file says what the shipped LM can read, and why it is made like this. No file of the project imports this
one. The shipped weights come from several sittings with an earlier corpus: this file makes their like, not their bytes.

    python models/nano/make.py --out models/mine       # 140 minutes on two cores; the same command resumes
    python models/nano/make.py --examine               # what the shipped base can read; or --examine models/mine
    python models/nano/make.py --check                 # makes a part of the corpus again and compares its hash
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import string
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the folder of envs.py

import envs  # noqa: E402
import negatives  # noqa: E402
from envs import UserError  # noqa: E402
from plumbing.options import add_options  # noqa: E402
from plumbing.runs import write  # noqa: E402
from plumbing.words import spelt_words_of, words_of  # noqa: E402
from reflect_rl import ACTION_HEADER, LABELS, NANO, Labels, Players, encode, load_base, policy_prompt  # noqa: E402
from sft import collate, loss_of  # noqa: E402

checks = envs.beside("../models/checks.py")
prepare = envs.beside("autoexplore/prepare.py")  # data/autoexplore/prepare.py, which makes new repositories

OPTIONS = {
    "out": ("models/mine", "folder of the new base LM"),
    "corpus_envs": ("taxi,autoexplore,alfworld", "environments in the corpus; also package.module:Class"),
    "seed": (0, "seed of everything"),
    "vocabulary": (5120, "most tokens"),
    "width": (128, "hidden size, a multiple of 32"),
    "layers": (4, "transformer blocks"),
    "copy_steps": (150, "updates that only copy, at first"),
    "steps": (11600, "updates, the copying included"),
    "batch": (16, "documents in an update"),
    "lr": (0.02, "peak learning rate of Muon"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "bf16": (False, "bf16 autocast"),
}
FACTS_HEADER = "# Facts:\n"
WARM_UP = 50  # updates in which the learning rate rises
MUON_TO_ADAMW = 0.3  # learning rate of AdamW's parameters, as a share of Muon's
MICRO_BATCH = 4  # texts in a forward pass
WORDS_OF = 500  # documents whose words are written down
SAVE_EVERY = 200  # updates between checkpoints

# ---------------------------------------------------------------------------------------------------------
# What is true of a state: pairs (beginning, rest) of sentences. The examination asks the LM to finish the beginning.

TAXI_RULES = (
    "Passenger waiting: the taxi has to pick up the passenger at P.",
    "Passenger on board: the taxi is shown as X and has to bring the passenger to D.",
    "The next goal of a trip: first the passenger, next the destination.",
    "To move into a wall was a mistake.",
    "To pick up the passenger or to drop off the passenger in the wrong place was a mistake.",
)


def describe_taxi(env):
    row, col, passenger, destination = envs.taxi_decode(env.taxi_state)
    places = {"destination": envs.LANDMARKS[destination]}
    if passenger != envs.ON_BOARD:
        places["passenger"] = envs.LANDMARKS[passenger]
    facts = [("The taxi is at row", f" {row} column {col}.")]
    facts.append(("The passenger is now", " on board." if passenger == envs.ON_BOARD else " waiting."))
    for name, (r, c) in places.items():
        facts.append((f"The {name} is at row", f" {r} column {c}."))
        facts.append((f"From the taxi to the {name}:", f" {envs.taxi_offset(row, col, r, c)}."))
    for action in envs.MOVES:
        r, c = envs.taxi_move(row, col, action)
        rest = " is blocked." if (r, c) == (row, col) else f" leads to row {r} column {c}."
        facts.append((f"To {env.actions[action]}", rest))
    facts.append(("Blocked:", f" {', '.join(env.blocked()) or 'nothing'}."))
    return facts + describe_last_move(env)


def describe_last_move(env):
    """What the last action was, where it began, and whether the taxi is now nearer to where it has to go."""
    (old_row, old_col, *_), (row, col, *_) = envs.taxi_decode(env.before), envs.taxi_decode(env.taxi_state)
    facts = [("The last action was", f" {env.last}.")]
    facts.append(("Before it the taxi was at row", f" {old_row} column {old_col}."))
    if (old_row, old_col) != (row, col):
        to_row, to_col = env.target()
        nearer = abs(row - to_row) + abs(col - to_col) < abs(old_row - to_row) + abs(old_col - to_col)
        facts.append((f"To {env.last} led", f" {'towards' if nearer else 'away from'} the next goal."))
    return facts


def split_behind(words, sentence):
    """A sentence as (beginning, rest), the beginning ending with the last `words`."""
    beginning, words, rest = sentence.rpartition(f" {words} ")
    return beginning + words.rstrip(), f" {rest}"


def describe_exploration(env):
    """The teacher's own sentences, and some more about files read and seen."""
    here, seen = env.names_here()
    facts = [split_behind("has the words", negatives.say_question(env))]
    verb, name = env.last
    if verb == "cat":
        topic = list(dict.fromkeys(words_of(env.result)))[:4]
        facts.append((f"The file {name} speaks of", f" {', '.join(topic) or 'nothing'}."))
        facts += [split_behind("is in", sentence) for sentence in negatives.say_file(env)]
    names = [negatives.say_name(env, "On the way", f"{name}/") for name in env.cwd]
    names += [negatives.say_name(env, "The name", name) for name in here]
    facts += [split_behind("has", sentence) for sentence in names]
    unread = [name for name in here if name not in seen]
    facts.append(("Seen here:", f" {', '.join(seen) or 'nothing'}."))
    facts.append(("Not seen yet:", f" {', '.join(unread) or 'nothing'}."))
    return facts


def describe_household(env):
    notes = env.notes
    facts = [
        f"You are at {notes.here or 'the middle of the room'}.",
        f"In hand is {notes.title(notes.hand) if notes.hand else 'nothing'}.",
        f"{len(notes.unsearched())} places are not searched.",
    ]
    if notes.here and envs.kind(notes.here) in envs.household()["openable"]:
        facts.append(f"{notes.here} is {'closed' if notes.here in notes.shut else 'open'}.")
    for place in notes.receptacles:
        things = notes.contents.get(place)
        if things is None:
            facts.append(f"{place} is not searched.")
        elif place == notes.here and place not in notes.shut:
            facts.append(f"On {place} there is {', '.join(envs.in_order(things)) or 'nothing'}.")
        else:
            facts.append(f"{place} is searched.")
    if env.goal:
        facts += describe_task(notes, env.goal)
    return [re.fullmatch(r"(.*? (?:is|are|be|was))( .*)", fact).groups() for fact in facts]


def describe_task(notes, goal):
    """What the task asks for, where such things are kept, what of it was seen."""
    verb = envs.treatment(goal["type"])
    facts = [f"The task is about {'two' if 'two' in goal['type'] else 'a'} {goal['object']}."]
    facts.append(f"The {'lamp is a' if goal['type'].startswith('look') else 'target is the'} {goal['target']}.")
    if verb:
        facts.append(f"It must be {envs.TRAITS[verb]}: a {envs.STATIONS[verb]} can {verb} it.")
    kinds = {envs.kind(place) for place in notes.receptacles}
    for name in (goal["object"], goal["target"]):
        homes = [home for home in envs.homes_of(name) if home in kinds]
        if homes:
            facts.append(f"A {name} is often in the {', '.join(homes)}.")
        if homes or name == goal["object"]:
            seen = [f"{notes.title(thing)} is in {place}." for thing, place in notes.where(name).items()]
            held = bool(notes.hand) and envs.kind(notes.hand) == name
            facts += seen or [f"The {name} is in hand." if held else f"No {name} was seen."]
    return facts


def furniture():
    """Kinds of things that go by a number: `cabinet 3` is a name, one token to the base LM's tokenizer."""
    names = set()
    for table in ("rooms", "homes"):
        for room in envs.household()[table].values():
            names |= set(room)
    return sorted(names)


def describe_own(env):
    """An environment of your own may have a method `describe`: that matters to this file alone."""
    describe = getattr(env, "describe", list)
    return describe()


@dataclasses.dataclass(frozen=True)
class Game:
    """What the corpus has of an environment, beside its play."""

    describe: callable = describe_own
    rules: tuple = ()  # sentences that are true of every state
    turns: int = 1  # documents of this environment, as a share
    words: callable = tuple  # that the tokenizer should know as one token each, though play may never show them
    numbered: callable = tuple


GAMES = {
    envs.DangerousTaxi: Game(describe_taxi, TAXI_RULES),
    # Two turns: to find words again is the hardest to learn.
    envs.AutoExplore: Game(describe_exploration, turns=2, words=prepare.common_words),
    envs.ALFWorld: Game(describe_household, numbered=furniture),
}


def game_of(name):
    return GAMES.get(envs.env_class(name), Game())


# ---------------------------------------------------------------------------------------------------------
# Random play


@functools.cache
def training_pool():
    """AutoExplore's repositories that come up again, all training questions about them, names of the written ones.

    These are `({name: tree}, tasks, names)`. The texts of the trees are whole, while `cat` shows their beginnings.
    """
    splits, trees, written, made = prepare.pool()
    return trees, written["train"] + made["train"], splits["train"]


@functools.lru_cache(maxsize=64)
def tree_of(repo):
    """The tree of a repository: `generated:SEED`, `reworded:SEED:NAME`, or the name of a written one."""
    trees, _, _ = training_pool()
    if repo in trees:
        return trees[repo]
    kind, seed, *original = repo.split(":")
    if kind == "generated":
        return prepare.generate_tree(int(seed))
    return prepare.reworded_tree(int(seed), original[0], trees[original[0]])


def exploration_task(env, rng):
    """A task of AutoExplore, mostly of a repository that comes up only once, generated or reworded: words that are met
    again and again are learned by heart, not compared."""
    _, tasks, written = training_pool()
    share = rng.random()
    if share < 0.3:
        task = rng.choice(tasks)
    else:
        kind, repo = "generated", f"generated:{rng.randrange(10 * prepare.INVENTED, 10**9)}"
        if share < 0.6:
            kind, repo = "reworded", f"reworded:{rng.randrange(10**9)}:{rng.choice(written)}"
        task = rng.choice(prepare.tasks_of_tree(tree_of(repo), repo, kind, rng, 1))
    # a copy: the shipped repositories are everybody's
    env.repos = {**env.repos, task["repo"]: prepare.shown_tree(tree_of(task["repo"]))}
    return task


def ask_near(env, rng):
    """Replace AutoExplore's question by one that is answered near by, or by random words of what is seen here and of a
    file elsewhere. Random play would else be far from what it was asked about nearly always, and "no word", "neither"
    would be right without reading."""
    # Read a file first, half of the time: to find words in a text is harder than in names, and comes up less often.
    files = [i for i, (verb, _) in enumerate(env.moves) if verb == "cat"]
    if files and env.steps + 1 < env.horizon and rng.random() < 0.5:
        env.step(rng.choice(files))
    place = env.cwd
    if env.last[0] == "cat" and rng.random() < 0.5:
        place = (*env.cwd, env.last[1])
    beginning = "".join(f"{name}/" for name in place)
    _, tasks, _ = training_pool()
    near = []
    for task in tasks:
        if task["repo"] == env.task["repo"] and f"{task['targets'][0]}/".startswith(beginning):
            near.append(task)
    if near and rng.random() < 0.5:
        env.task = rng.choice(near)
        env.question = " ".join(env.task["question"].split())
        env.targets = {tuple(target.split("/")) for target in env.task["targets"]}
        return
    texts = (" ".join(env.names_here()[0]), " ".join(env.cwd), env.result)
    pools = [words for words in map(spelt_words_of, texts) if words]
    elsewhere = rng.choice([text for _, text in envs.files_of(tree_of(env.task["repo"]))])
    pools.append(spelt_words_of(elsewhere) or ["nothing"])
    words = list(dict.fromkeys(rng.choice(rng.choice(pools)) for _ in range(rng.randint(3, 8))))
    env.question = f"Which file about {words[0]} says: {' '.join(words[1:])}?"


def random_walk(env, rng, length):
    """Random play of at most `length` steps that does not end: (state, actions); the environment stays there."""
    exploring, tasks = isinstance(env, envs.AutoExplore), env.tasks("train")
    if isinstance(env, envs.DangerousTaxi):  # `final` was cut from `train` after the base was made
        tasks += env.tasks("final")
    options = {**env.training, "task": exploration_task(env, rng) if exploring else rng.choice(tasks)}
    if isinstance(env, envs.DangerousTaxi):
        options["mode"] = rng.choice(env.modes)
    seed, history = rng.getrandbits(32), []
    state, info, _ = negatives.replay(env, options, seed, history)
    for _ in range(length):
        action = rng.randrange(len(info["actions"]))
        state, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            state, info, _ = negatives.replay(env, options, seed, history)
        else:
            history.append(action)
    if exploring and rng.random() < 0.8:
        ask_near(env, rng)
        return env.render(), tuple(env.actions)
    return state, tuple(info["actions"])


# ---------------------------------------------------------------------------------------------------------
# Documents


def document(name, rng, labels):
    """One document: a state, facts about it, a shuffled menu, the label of a random action, what the action did."""
    env, game = envs.make(name), game_of(name)
    state, actions = random_walk(env, rng, rng.randrange(20))
    sentences = [beginning + rest for beginning, rest in game.describe(env)]
    if game.rules:
        sentences.append(rng.choice(game.rules))
    # In a shuffled menu a label means its line and nothing else.
    menu = rng.sample(range(len(actions)), len(actions))
    pick = rng.randrange(len(menu))
    action, named = actions[menu[pick]], rng.random()
    # Name the action among the facts, or its verb alone: this teaches to find its label, or one of those that will do.
    if named < 0.75:
        sentences.append(f"Now: {action if named < 0.5 else action.split()[0]}.")
    # In order the facts teach to go through a listing; shuffled, each has to be found by itself.
    if rng.random() < 0.5:
        rng.shuffle(sentences)
    shuffled = tuple(actions[i] for i in menu)
    names, _ = labels(shuffled)
    prompt = policy_prompt(f"{state}\n{FACTS_HEADER}{' '.join(sentences)}", None, shuffled, names)
    after, *_ = env.step(menu[pick])
    return f"{prompt}{names[pick]}\n{after.splitlines()[-1]}"


def corpus(labels, seed, numbers):
    """The documents with these numbers, a function of its arguments alone; the environments take turns.

    `labels`: `{environment: Labels}`.
    """
    turns = []
    for name in labels:
        turns += [name] * game_of(name).turns
    documents = []
    for i in numbers:
        name = turns[i % len(turns)]
        documents.append(document(name, random.Random(f"{seed}/{i}"), labels[name]))
    return documents


def met_words(labels, seed):
    """The words that come up in two of the first documents or more, one a line: checks.say_strange_words."""
    counts = collections.Counter()
    for text in corpus(labels, seed, range(WORDS_OF)):
        counts.update(checks.different_words(text))
    return "".join(f"{word}\n" for word in sorted(counts) if counts[word] > 1)


def labels_of(names, tokenizer):
    return {name: Labels(tokenizer, envs.env_class(name).settings.get("labels", "letters")) for name in names}


def encode_behind(tokenizer, prompt, text):
    """(prompt ids, ids of the text behind it)."""
    before = encode(tokenizer, prompt)
    return before, encode(tokenizer, prompt + text)[len(before) :]


def reading_pairs(labels, tokenizer, seed, numbers):
    """Documents as token ids (state, the rest). States are read only: their names and numbers are random."""
    pairs = []
    for text in corpus(labels, seed, numbers):
        state, header, rest = text.partition(FACTS_HEADER)
        prompt, completion = encode_behind(tokenizer, state + header, rest)
        pairs.append((prompt, [*completion, tokenizer.eos_token_id]))
    return pairs


def copying_pair(rng, vocabulary):
    """Random tokens, to be said again. It teaches to copy, and gives every token of the vocabulary an embedding of its
    own: those that play never shows would else collapse into one, and a frozen base could not tell them apart."""
    tokens = [rng.randrange(vocabulary) for _ in range(rng.randrange(4, 24))]
    return tokens, tokens


def batch_at(step, labels, tokenizer, args):
    """The token-id pairs of an update, a function of its number: first only copying, then reading with some copying."""
    reading = step >= args.copy_steps
    rng, pairs = random.Random(f"{args.seed}/exercises/{step}"), []
    for _ in range(args.batch // 2 if reading else 4 * args.batch):
        pairs.append(copying_pair(rng, len(tokenizer)))
    if reading:
        pairs += reading_pairs(labels, tokenizer, args.seed, range(step * args.batch, (step + 1) * args.batch))
    return pairs


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

JOINED = "\u2040"  # a tie; "a/b" is read as "a", "/\u2040", " b": it says that no space followed


def train_tokenizer(texts, size, numbered=()):
    """Byte-level BPE in which every digit (with the space before it) and every punctuation mark is a token of its own,
    so that a grid cell never merges with its neighbours. Things that go by a number (`numbered`: `cabinet 3`) keep it:
    they are names. The end-of-text token is id 0; it is also the padding (masks never look at ids).

    A word has the same tokens behind a space, a new line and an ASCII mark: `oven` of "an oven", "/oven", "my_oven".
    Else it could not be found by comparing tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    marks = [(re.escape(mark), mark + JOINED) for mark in string.punctuation + string.digits]
    replace = [normalizers.Replace(Regex(rf"{old}(?=\p{{L}})"), f"{new} ") for old, new in [(r"\n", "\n"), *marks]]
    tokenizer.normalizer = normalizers.Sequence(replace)
    names = rf" ?(?:{'|'.join(numbered)}) \p{{N}}{{1,2}}(?!\p{{N}})|" if numbered else ""
    words = rf" ?\p{{L}}+| ?\p{{N}}{JOINED}?|[^\s\p{{L}}\p{{N}}]{JOINED}?|\s"
    pieces = pre_tokenizers.Split(Regex(names + words), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    untie = [decoders.Replace(f"{JOINED} ", ""), decoders.Replace(Regex(r"\n (?=\p{L})"), "\n")]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *untie])
    end, alphabet = "<|end|>", pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def make_tokenizer(names, args):
    """The tokenizer of a new base, trained on documents, on labels and words, and on teacher reflections."""
    letters = dict.fromkeys(names, lambda actions: (LABELS, None))
    texts = corpus(letters, f"tokenizer/{args.seed}", range(3000))
    words, numbered = list(LABELS), []
    for name in names:
        words += game_of(name).words()
        numbered += game_of(name).numbered()
        # The tokenizer, and it alone, sees reflections: it should spell them in few tokens.
        env_class = envs.env_class(name)
        if env_class in GAMES:
            records, _ = negatives.make_records(functools.partial(envs.make, name), 30, 0.5, args.seed)
            texts += [record.reflection for record in records]
    texts += ["".join(f" {word}" for word in words)] * 100  # one token each, behind a space or a new line
    return train_tokenizer(texts, args.vocabulary, numbered)


# ---------------------------------------------------------------------------------------------------------
# Model


def new_base(vocabulary, width, layers):
    """A small Llama, with heads of 32 dimensions. Its positions are relative (rotary): what it learns at one place of a
    text it knows at all. A GPT-2 shape learned to find labels where it had seen them, and nowhere else."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,  # three matrices: about as many weights as GPT-2's two of 4 * width
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow: within 300 tokens few pairs turn round
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return initialised(LlamaForCausalLM(config))


@torch.no_grad()
def initialised(model):
    """Larger embeddings, and two heads of the first block that look a fixed way back, by their biases alone.

    Copying means to find where the present token occurred and to go on as it went on there (an induction head, Olsson
    et al. 2022). It needs, in a layer below, a head that says what came before: the first. The second gathers the last
    four tokens. README.md says how much sooner a base then copies. All reading of names waits for copying.
    """
    model.model.embed_tokens.weight.mul_(4)
    attention, frequency = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    half = len(frequency)  # rotary pairs of a head: (i, half + i), turned by position * frequency[i]
    looks = ((1, 0, 6.0), (1.5, 1, 4.5))  # how far back, first rotary pair, gain: sharp, and a window
    for head, (back, first, gain) in enumerate(looks[: model.config.num_attention_heads]):
        rows, some = slice(2 * half * head, 2 * half * (head + 1)), slice(first, half // 2)
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 0, 0
        query, key, angle = attention.q_proj.bias[rows], attention.k_proj.bias[rows], back * frequency[some]
        key[:half][some] = gain
        query[:half][some], query[half:][some] = gain * angle.cos(), -gain * angle.sin()  # the key, turned back
    return model


def optimizers_of(model, lr):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        in_block = ".layers." in name and parameter.ndim == 2
        (matrices if in_block else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=0.95)
    return [muon, torch.optim.AdamW(rest, lr=MUON_TO_ADAMW * lr, weight_decay=0.01, betas=(0.9, 0.99))]


# ---------------------------------------------------------------------------------------------------------
# Examination


@torch.no_grad()
def predicted(model, pairs):
    """Of each (prompt, completion): whether all tokens of the completion are the most probable ones, given the true
    ones before them."""
    right = []
    for start in range(0, len(pairs), 16):
        ids, mask = collate(pairs[start : start + 16], model.device)
        best = model(ids, use_cache=False).logits[:, :-1].argmax(-1)  # (B, T-1)
        right += ((best == ids[:, 1:]) | ~mask[:, 1:]).all(1).tolist()
    return right


def reading_accuracy(model, tokenizer, name, states=200, seed=1):
    """How well the LM can read an environment: `{beginning of a fact: (finished right, asked)}` on random-play states.

    Beginnings that differ only in names with numbers, dots or slashes are one: `On ... there is`.
    """
    env, rng, right = envs.make(name), random.Random(f"read/{seed}"), {}
    for _ in range(states):
        state, _ = random_walk(env, rng, rng.randrange(20))
        facts = game_of(name).describe(env)
        pairs = []
        for beginning, rest in facts:
            pairs.append(encode_behind(tokenizer, f"{state}\n{FACTS_HEADER}{beginning}", rest))
        for (beginning, _), ok in zip(facts, predicted(model, pairs) if pairs else (), strict=True):
            kind = re.sub(r"^\S+(?= is in$)|[a-z]+ \d+|\S+[./]\S*", "...", beginning)
            before = right.get(kind, (0, 0))
            right[kind] = (before[0] + ok, before[1] + 1)
    return right


def label_accuracy(model, tokenizer, documents):
    """How often the LM finds the label of the action that a document names in full: `(right, asked)`."""
    pairs = []
    for text in documents:
        before, _, after = text.rpartition(ACTION_HEADER)
        label, _, _ = after.partition("\n")
        for line in before.splitlines():
            if line.startswith(f"{label} "):
                action = line.removeprefix(f"{label} ")  # the last such line, since the menu comes last
        if f"Now: {action}." in before:
            pairs.append(encode_behind(tokenizer, before + ACTION_HEADER, label))
    return sum(predicted(model, pairs)) if pairs else 0, len(pairs)


@torch.no_grad()
def held_out_loss(players, labels, seed):
    """In nats a token, on 60 documents that training never sees."""
    return loss_of(reading_pairs(labels, players.tokenizer, f"valid/{seed}", range(60)), players)


def examine(model, tokenizer, names, seed=0, documents=200, states=200):
    """Print what a base LM can do: its held-out loss, labels that it finds, sentences that it finishes."""
    labels = labels_of(names, tokenizer)
    loss = held_out_loss(Players(model, tokenizer, micro_batch=MICRO_BATCH), labels, seed)
    print(f"{model.num_parameters():,} parameters, held-out loss {loss:.4f} nats a token")
    for name in names:
        texts = corpus({name: labels[name]}, f"labels/{seed}", range(documents))
        right, asked = label_accuracy(model, tokenizer, texts)
        print(f"{name}: finds the label of a named action {right / max(1, asked):.1%} of {asked} times; finishes facts")
        found = reading_accuracy(model, tokenizer, name, states)
        for kind, (right, asked) in sorted(found.items(), key=lambda item: -item[1][1])[:16]:
            print(f"  {kind:40} {right / asked:6.1%} of {asked}")


# ---------------------------------------------------------------------------------------------------------
# Training


def lr_share(step, steps):
    """Share of the peak learning rate: a linear warm-up, then a cosine down to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def open_folder(out, names, args):
    """The folder with the plan and the tokenizer of a new base; a resumed run must not number its tokens anew."""
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already: give another --out")
    if args.width < 32 or args.width % 32:
        raise UserError(f"--width must be a multiple of 32, the size of a head, not {args.width}")
    out.mkdir(parents=True, exist_ok=True)
    plan = {name: value for name, value in vars(args).items() if name in OPTIONS and name not in ("out", "device")}
    if not (out / "plan.json").exists():
        make_tokenizer(names, args).save_pretrained(out)
        write(out / "plan.json", json.dumps(plan, indent=2) + "\n")
    elif json.loads((out / "plan.json").read_text()) != plan:
        raise UserError(f"{out} was begun with other options: see its plan.json, or give another --out")


def train(args):
    """Make a base LM from nothing. Interrupted, the same command goes on from the last checkpoint."""
    names, out = args.corpus_envs.split(","), Path(args.out)
    open_folder(out, names, args)
    tokenizer = AutoTokenizer.from_pretrained(out)
    labels = labels_of(names, tokenizer)
    torch.manual_seed(args.seed)
    model = new_base(len(tokenizer), args.width, args.layers).to(args.device)
    players = Players(model, tokenizer, dtype="autocast" if args.bf16 else "fp32", micro_batch=MICRO_BATCH)
    optimizers, start, checkpoint = optimizers_of(model, args.lr), 0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=out.name, unit="update")
    for step in bar:
        for optimizer, share in zip(optimizers, (1, MUON_TO_ADAMW), strict=True):
            optimizer.param_groups[0]["lr"] = share * args.lr * lr_share(step, args.steps)
        loss = loss_of(batch_at(step, labels, tokenizer, args), players, backward=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            state = {"step": step + 1, "model": model.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)  # a kill leaves the old one or the new one
            held_out = held_out_loss(players, labels, args.seed)
            bar.write(f"update {step + 1:5}: loss {loss:.3f}, held out {held_out:.3f} nats a token")
    model.save_pretrained(out)
    write(out / "words.txt", met_words(labels, args.seed))
    checkpoint.unlink(missing_ok=True)
    examine(model.eval(), tokenizer, names, args.seed)


def check():
    """Make a part of the corpus again, with the shipped tokenizer, and its words; exit 1 if they are not what they
    were."""
    guards = json.loads((ROOT / "tests" / "guards.json").read_text(encoding="utf-8"))
    labels, changed = labels_of(("taxi", "autoexplore", "alfworld"), AutoTokenizer.from_pretrained(NANO)), []
    for guard, seed in (("nano corpus, 60 documents", 0), ("nano corpus, held out, 60 documents", "valid/0")):
        text = json.dumps(corpus(labels, seed, range(60)))
        if hashlib.sha256(text.encode()).hexdigest()[:16] != guards[guard]:
            changed.append(guard)
    if met_words(labels, 0) != (NANO / "words.txt").read_text(encoding="utf-8"):
        changed.append("words.txt")
    print(f"changed: {', '.join(changed)}" if changed else "the corpus is what it was")
    sys.exit(bool(changed))


def main():
    parser = argparse.ArgumentParser(description="Make a small base LM from nothing.", allow_abbrev=False)
    add_options(parser, OPTIONS)
    parser.add_argument("--examine", nargs="?", const=str(NANO), metavar="DIR", help="examine a finished base LM")
    parser.add_argument("--check", action="store_true", help="make a part of the corpus again and compare")
    args = parser.parse_args()
    if args.check:
        check()
    elif args.examine:
        examine(*load_base(args.examine, args.device), args.corpus_envs.split(","), args.seed)
    else:
        train(args)


if __name__ == "__main__":
    envs.run_main(main)
