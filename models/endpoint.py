"""Chat models behind an endpoint (OpenAI's, or any server that speaks its language): a teacher, a player.

The paper's teacher is GPT-4, its baselines are GPT-4 and Mistral 7B. `OPENAI_BASE_URL` says where the endpoint is,
`OPENAI_API_KEY` who asks; the key is written nowhere. Every answer is in a file at once: an interrupted run goes on
where it was and pays nothing twice. Needs `pip install openai`; docs/teacher.md shows what came out.

    python negatives.py --env taxi --teacher openai --teacher-model NAME --out FILE    # then sft.py --data FILE
    python eval.py --env taxi --player openai --player-model NAME
    python data/autoexplore/prepare.py --repos DIR --out FILE --teacher openai --teacher-model NAME
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from envs import UserError
from reflect_rl import ACTION_HEADER, LABELS, Step, encode_all, one_line, policy_prompt, reflector_prompt

OPTIONS = {
    "answers": ("runs/answers.jsonl", "file that keeps every answer of an endpoint; what is in it is not asked again"),
    "parallel": (4, "requests to an endpoint at once", 1),
    "request": ([], "KEY=VALUE field of every request to an endpoint, repeatable, such as temperature=0 (default: "
                    "max_tokens=150, temperature=1; null leaves a field out)"),
    "dry_run": (False, "ask no endpoint: print prompts, the number of calls, an estimate of tokens"),
}
REQUEST = {"max_tokens": 150, "temperature": 1}
RETRIES, TIMEOUT = 8, 120  # of the openai package, on 408, 409, 429, 5xx and a lost connection; seconds
TRIES = 4  # where an answer is empty or no JSON
MOST_USELESS = 10  # prompts without an answer that can be used, before one with: then something is wrong
THIS_PROMPT = (400, 413, 422)  # status of a prompt that is refused: too long, filtered
SECRET = 16  # letters: a shorter key is a word that a server of one's own wants, and may stand in an answer
SPOILT = 2  # times that a reflection which names the best action is asked for again
MOST_WORDS = 60  # of a reflection


def user(text):
    return {"role": "user", "content": text}


def turn(about, question):
    return [{"role": "system", "content": about}, user(question)]


class Chat:
    """Asks a model and keeps its answers. `--dry-run` asks nothing, and then `ask_all` gives None."""

    def __init__(self, model, args):
        if not model:
            raise UserError("which model? name it as the endpoint does: --teacher-model or --player-model")
        self.model, self.parallel, self.dry_run = model, args.parallel, args.dry_run
        fields = REQUEST | dict(args.request)
        self.request = {name: value for name, value in fields.items() if value is not None}
        self.path, self.lock = Path(args.answers), threading.Lock()
        self.answers, self.tokens = read_answers(self.path), collections.Counter()
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if self.dry_run:
            return
        try:
            import openai
        except ImportError:
            raise UserError("an endpoint needs the openai package: pip install openai") from None
        if not self.key and not os.environ.get("OPENAI_BASE_URL"):
            raise UserError("set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own")
        self.openai, self.trouble = openai, ""
        try:  # a server of one's own asks for no key, but the package does
            self.client = openai.OpenAI(api_key=self.key or "none", max_retries=RETRIES, timeout=TIMEOUT)
        except Exception as error:  # an address that is none
            raise UserError(f"OPENAI_BASE_URL: {self.without_key(str(error))[:300]}") from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)  # one write a line: a kill loses what was on its way, no more
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self.file.write(b"\n")  # behind the half line of a kill

    def ask(self, messages, draw=0):
        """The answer to some messages: the one that is kept, or a new one; "" where none can be used.

        `draw`: 0, 1, ... for several answers to one prompt.
        """
        asked = json.dumps([self.model, messages, self.request, draw], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        with self.lock:
            if key in self.answers:
                self.tokens["known"] += 1
                return self.answers[key]
        for _ in range(TRIES):
            answer = self.ask_now(messages)
            if answer is None or answer:
                break
        with self.lock:
            if answer:
                self.file.write((json.dumps({"key": key, "model": self.model, "answer": answer}) + "\n").encode())
                self.answers[key] = answer
                self.tokens["kept"] += 1
                return answer
            self.tokens["useless"] += 1
            if self.tokens["useless"] >= MOST_USELESS and not self.tokens["kept"] + self.tokens["known"]:
                raise UserError(f"{MOST_USELESS} prompts, and no answer that can be used{self.trouble}: is "
                                "OPENAI_BASE_URL right, is max_tokens (--request) large enough?")
        return ""

    def ask_now(self, messages):
        """One request; the answer's text, "" where it is empty or cannot be read, None where this prompt is refused."""
        try:
            done = self.client.chat.completions.create(model=self.model, messages=messages, extra_body=self.request)
            text, usage = done.choices[0].message.content, done.usage
        except self.openai.APIStatusError as error:
            # The error message about a bad key may repeat a part of it.
            why = "the key" if error.status_code in (401, 403) else self.without_key(error.message)[:300]
            if error.status_code in THIS_PROMPT:
                self.trouble = f" ({why})"
                return None
            raise UserError(f"the endpoint refuses, {error.status_code}: {why}") from None
        except self.openai.OpenAIError as error:
            raise UserError(f"no answer from the endpoint: {self.without_key(str(error))[:300]}") from None
        except (ValueError, AttributeError, TypeError, IndexError):  # broken JSON, or JSON of another form
            return ""
        with self.lock:
            self.tokens["answers"] += 1
            for name, field in (("read", "prompt_tokens"), ("written", "completion_tokens")):
                count = getattr(usage, field, 0)
                self.tokens[name] += count if isinstance(count, int) else 0
        if not isinstance(text, str):
            return ""
        text = re.sub(r"(?s)<think>.*?(</think>|$)", "", text)  # what it thought aloud
        return (self.without_key(text) if len(self.key) >= SECRET else printable(text)).strip()

    def without_key(self, text):
        return printable(text.replace(self.key, "...") if self.key else text)

    def ask_all(self, prompts, answer):
        """`{prompt: answer(prompt)}` of different prompts (tuples of texts), several at once, with a bar."""
        prompts, answers = list(dict.fromkeys(prompts)), {}
        if self.dry_run:
            return self.tell(prompts, len(prompts))
        # Its threads end with the process: after an error or Ctrl-C nobody waits for the answers on their way.
        with ThreadPool(self.parallel) as pool:
            each = pool.imap_unordered(lambda prompt: (prompt, answer(*prompt)), prompts)
            answers.update(tqdm(each, total=len(prompts), desc=self.model, unit="answer", disable=None, leave=False))
        return answers

    def tell(self, prompts, calls):
        """What `--dry-run` prints: two prompts, and what all will take, at four letters a token."""
        for prompt in prompts[:2]:
            print("\n".join(prompt[:2]) + "\n" + "-" * 60)
        letters = sum(len("".join(prompt[:2])) for prompt in prompts) / max(1, len(prompts))
        most = self.request.get("max_tokens") or self.request.get("max_completion_tokens") or 0
        print(f"{calls} calls (fewer where answers are known, more where one is asked for again), about "
              f"{calls * letters / 4:,.0f} tokens to read and {calls * most:,} to write at most. Nothing was asked.")

    def say_totals(self):
        t = self.tokens
        print(f"{self.model}: {t['answers']} answers received, {t['known']} known from {self.path}; "
              f"tokens: {t['read']:,} read, {t['written']:,} written")
        if t["useless"]:
            print(f"  {t['useless']} prompts got no answer that can be used{self.trouble}")


def printable(text):
    """A text from outside without control characters and halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def read_answers(path):
    """`{key: answer}` of a file of answers; a line that a kill left half written is left out."""
    answers = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            kept = json.loads(line)
            answers[kept["key"]] = str(kept["answer"])
        except (ValueError, KeyError, TypeError):
            continue
    return answers


def rules_of(env):
    """What a model is told about a game: the first two paragraphs of the docstring of its class, if it has one."""
    text = type(env).__doc__ or ""
    return f"The game {type(env).__name__}. " + one_line(" ".join(text.split("\n\n")[:2]))


# ---------------------------------------------------------------------------------------------------------
# Teacher: reflections on optimal and perturbed steps


def teacher_prompt(env, record, last):
    """`(about the game, the question)`. `last`: the last action, "" at the beginning of an episode."""
    told = "There was no action yet."
    if last:
        told = f'The last action, "{last}", was {"a mistake" if record.mistake else "right"}.'
    best = record.actions[record.action]
    return (
        f"You write notes for an agent that plays a text game. {rules_of(env)} A note is one or two short sentences in "
        "plain words: where things are, whether the last action was a mistake, which goal comes next. It never says "
        'which action to take. An example: "The key is two rooms to the left. The last action was a mistake, it led '
        'away from the key. Next goal: the key."',
        f'{record.state}\n\n{told} The best action now is "{best}", which you do not write. Write the note for the '
        "agent: one or two sentences.",
    )


def plain(text):
    return " ".join(word for word in re.findall(r"\w+|\.\.", text.lower()) if word not in ("a", "an", "the"))


def spoils(reflection, action):
    """Whether a reflection has the words of the action in a row, in any case; articles and marks do not count.

    Other words for the same ("go down" for "move south") are not found: read some of what you get.
    """
    return f" {plain(action)} " in f" {plain(reflection)} "


def shortened(text):
    """At most MOST_WORDS words; what was cut off within a sentence ends with the last whole one."""
    text = " ".join(text.split()[:MOST_WORDS])
    whole = text[: max(map(text.rfind, ".!?")) + 1]
    return whole or text


def teach(records, env, chat):
    """The records with a model's reflections; None with `--dry-run`. Each comes with its last action as reflection.

    A reflection that names the best action is asked for again, twice at most. Then its record is left out: a policy
    that reads the action learns to copy it, and nothing is left for RL to explore.
    """
    asked = []  # a record's prompt, and what it must not say
    for record in records:
        asked.append((*teacher_prompt(env, record, record.reflection), record.actions[record.action]))

    def reflection(about, question, best):
        messages, spoilt = turn(about, question), 0
        while True:
            answer = chat.ask(messages)
            text = shortened(one_line(answer))
            if not spoils(text, best):
                return text, spoilt
            spoilt += 1
            if spoilt > SPOILT:
                return "", spoilt
            again = f'That has the words "{best}". Write the note again without them.'
            messages = [*messages, {"role": "assistant", "content": answer}, user(again)]

    written = chat.ask_all(asked, reflection)
    if written is None:
        return None
    kept, spoilt = [], 0
    for record, prompt in zip(records, asked, strict=True):
        text, times = written[prompt]
        spoilt += times > 0
        if text:
            kept.append(dataclasses.replace(record, reflection=text))
    print(f"{spoilt} of {len(records)} reflections named the best action at first; {len(records) - len(kept)} did so "
          f"{SPOILT + 1} times, or stayed empty: their records are left out")
    chat.say_totals()
    if not kept:
        raise UserError(f"{chat.model} wrote no reflection that can be used")
    return kept


# ---------------------------------------------------------------------------------------------------------
# Reverse question generation: read a file, write a question that it answers


def questions(files, chat):
    """`{name: (question, answer)}` for `{name: text of a file}`, None where a model's answer has another form; with
    `--dry-run` nothing. What is kept of them data/autoexplore/prepare.py decides."""
    about = (
        "You write questions about files. A question can be answered from its file alone, is one sentence of 5 to 20 "
        "words, uses words of the file, and does not say the file's name."
    )
    form = (
        "Write one question that this file answers, and the answer as a few words copied from the file, in this form:"
        "\nQuestion: ...\nAnswer: ..."
    )
    prompts = {name: (about, f"The file:\n\n{text}\n\n{form}") for name, text in files.items()}
    answers = chat.ask_all(prompts.values(), lambda *prompt: chat.ask(turn(*prompt)))
    if answers is None:
        return None
    chat.say_totals()
    found = {}
    for name, prompt in prompts.items():
        both = re.search(r"Question:\s*(\S.*)\s+Answer:\s*(\S.*)", answers[prompt])
        found[name] = (both[1].strip(), both[2].strip(" .\"'")) if both else None
    return found


# ---------------------------------------------------------------------------------------------------------
# Player: an actor of `reflect_rl.play`

ANSWER = "Answer with the letter of one action, nothing else."


def named_action(answer, labels, actions):
    """Index of the action that an answer names: by its label at the beginning, or as the only one whose words it has.

    None where it names none, or several.
    """
    first = re.match(r"\W*(?:[Aa]ction:\s*)?(\w)(?!['’]?\w)(.*)", answer)  # a line
    if first and first[1] in labels:
        index, rest = labels.index(first[1]), first[2]
        # "A taxi is ..." begins with a word, not with a label.
        if not rest[:1].isspace() or not rest.strip() or plain(rest).startswith(plain(actions[index])):
            return index
    found = [index for index, action in enumerate(actions) if spoils(answer, action)]
    return found[0] if len(found) == 1 else None


class Player:
    """Takes the action that a model names, with or without a turn of reflection before it.

    An answer that names no action is counted, and a random action is taken.
    """

    def __init__(self, chat, env, reflect):
        self.chat, self.reflect = chat, reflect
        self.name = f"{chat.model} {'with' if reflect else 'without'} reflection"
        self.about = f"You play a text game. {rules_of(env)}"
        self.draws = collections.Counter()  # of each prompt: how often it was asked in this row
        self.unclear = self.asked = 0

    def ask(self, prompts):
        """The answers to some prompts, a sample each: equal prompts are asked as often as they come up."""
        numbered = []
        for prompt in prompts:
            self.draws[prompt] += 1
            numbered.append((self.about, prompt, self.draws[prompt]))
        answers = self.chat.ask_all(numbered, lambda about, prompt, draw: self.chat.ask(turn(about, prompt), draw))
        return [answers[prompt] for prompt in numbered]

    def reflection_prompt(self, state):
        return f"{reflector_prompt(state)}\nWrite one or two short sentences: what matters here, what is the next goal?"

    def action_prompt(self, state, actions, reflection):
        """The policy's own prompt, and what to answer."""
        if len(actions) > len(LABELS):
            raise UserError(f"{len(actions)} actions, and only {len(LABELS)} letters and digits to name them by")
        return policy_prompt(state, reflection, actions, LABELS) + ANSWER

    def tell(self, tasks, env, repeats):
        """`--dry-run`: the first prompt of each episode, and as many calls as there may be."""
        prompts = []
        for task in tasks:
            state, info = env.reset(seed=0, options={"task": task})
            first = self.action_prompt(state, info["actions"], None)
            prompts.append((self.about, self.reflection_prompt(state) if self.reflect else first))
        self.chat.tell(prompts, len(tasks) * repeats * env.horizon * (1 + self.reflect))

    def __call__(self, episodes, known):
        reflections = [None] * len(episodes)
        if self.reflect:
            answers = self.ask([self.reflection_prompt(episode.state) for episode in episodes])
            reflections = [shortened(one_line(answer)) for answer in answers]
        prompts = []
        for episode, reflection in zip(episodes, reflections, strict=True):
            prompts.append(self.action_prompt(episode.state, episode.actions, reflection))
        steps = []
        for episode, reflection, prompt, answer in zip(episodes, reflections, prompts, self.ask(prompts), strict=True):
            n = len(episode.actions)
            index = named_action(answer, LABELS[:n], episode.actions)
            self.asked, self.unclear = self.asked + 1, self.unclear + (index is None)
            log_probs = [-math.log(n)] * n if index is None else [0.0 if i == index else -math.inf for i in range(n)]
            steps.append(Step(episode.state, episode.actions, reflection, prompt, log_probs=log_probs))
        return steps


def player_rows(args, env, tasks, row):
    """The rows of the table, without and with reflection; none with `--dry-run`. `row`: that of eval.py."""
    rows, chat = [], Chat(args.player_model, args)
    for reflect in (False, True):
        player = Player(chat, env, reflect)
        if args.dry_run:
            player.tell(tasks, env, args.repeats)
            continue
        rows.append(row(player.name, lambda player=player: player, args, greedy=False))
        print(f"{player.name}: {player.unclear} of {player.asked} answers named no action; a random one was taken")
    if rows:
        chat.say_totals()
    return rows


# ---------------------------------------------------------------------------------------------------------
# A chat model that is here: its tokenizer's template around the policy's prompt


def through_template(players):
    """Untuned players whose prompts stand in the tokenizer's chat template, where it has one."""
    if players.tokenizer.chat_template:
        players.steps = functools.partial(template_steps, players.tokenizer, players.steps)
    return players


def template_steps(tokenizer, make_steps, *told):
    """The same steps; each prompt is a user's turn, and the answer begins with the header behind which a label stands.

    A prompt stays plain text: what looks like a part of the template in a state is spelt out.
    """
    mark, steps = "@@prompt@@", make_steps(*told)
    text = tokenizer.apply_chat_template([user(mark)], tokenize=False, add_generation_prompt=True)
    before, after = text.split(mark)
    before = tokenizer.encode(before, add_special_tokens=False)
    after = tokenizer.encode(after + ACTION_HEADER, add_special_tokens=False)
    prompts = [step.prompt + ANSWER for step in steps]
    for step, ids in zip(steps, encode_all(tokenizer, prompts, bos=False), strict=True):
        step.ids = [*before, *ids, *after]
    return steps
