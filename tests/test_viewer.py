"""The page of `eval.py --html`: what is in it, what cannot get out of it, whose marks it shows."""

import dataclasses
import html.parser
import json
import math
import re
import sys

import pytest
from conftest import ROOT, resolved, run_script
from corridor import Corridor

import envs
import eval as evaluation
from envs import UserError
from reflect_rl import Step

viewer = envs.beside("viewer.py")
HOSTILE = "</script><script>alert(1)</script> <!-- <script> \u2028 \ud800 \u00e9"


class Elements(html.parser.HTMLParser):
    """The tags of a page, in order, and the text of its script elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def page_of(rows, path):
    """The page of some rows as text, and the JSON in it."""
    viewer.write_html(rows, {"env": "taxi", "split": "test"}, evaluation.PANEL_SEED, path)
    text = path.read_text(encoding="utf-8")
    return text, json.loads(Elements(text).scripts[0])


def rows_of(env, actor, make_env, name="row"):
    return [{"name": name, "env": env, "sampled": [evaluation.evaluate(actor, make_env, repeats=1)], "greedy": []}]


def test_the_page_holds_what_was_played(tmp_path):
    """Catches a step left out or told twice, a log-probability in a probability's place, -inf, which is not JSON, an
    outcome read off the return, and a page that asks another machine for something."""
    episodes = evaluation.evaluate(evaluation.random_actor, Corridor, repeats=2)
    first = episodes[0].steps[0]
    first.log_probs, first.action = [-math.inf, 0.0], 1
    rows = [{"name": "one", "env": Corridor(), "sampled": [episodes], "greedy": []}]
    text, found = page_of(rows, tmp_path / "page.html")
    assert found["settings"] == {"env": "taxi", "split": "test"} and "http://" not in text and "https://" not in text
    [run] = found["runs"]
    assert run["name"] == "one" and run["episodes"][0]["steps"][0]["probs"] == [0.0, 1.0]
    for number, (told, episode) in enumerate(zip(run["episodes"], episodes, strict=True)):
        assert (told["number"], told["task"], told["return"]) == (number, episode.task, pytest.approx(episode.total))
        assert told["end"] == episode.state and told["groups"] == []
        assert told["outcome"] == ("success" if episode.success else "failure" if episode.terminated else "out of time")
        for shown, step in zip(told["steps"], episode.steps, strict=True):
            for key in ("state", "reflection", "action", "reward"):
                assert shown[key] == getattr(step, key)
            assert tuple(shown["actions"]) == tuple(step.actions)
            assert shown["probs"] == pytest.approx([math.exp(log_prob) for log_prob in step.log_probs], abs=1e-6)
    assert {told["outcome"] for told in run["episodes"]} > {"failure"}, "too few kinds of episodes to see a mix-up"
    two_seeds = [{**rows[0], "sampled": [episodes, episodes]}]
    names = [run["name"] for run in page_of(two_seeds, tmp_path / "page.html")[1]["runs"]]
    assert len(set(names)) == 2, "links name an episode by its run"


def test_no_text_gets_out_of_the_page(tmp_path):
    """Catches a file name, reflection or run name that ends the script element with the JSON and becomes HTML."""
    [row] = rows_of(Corridor(), evaluation.random_actor, Corridor, name=HOSTILE)
    for episode in row["sampled"][0]:
        for step in episode.steps:
            step.state = step.reflection = HOSTILE
            step.actions = (HOSTILE,) * len(step.actions)
        episode.state = HOSTILE
    text, found = page_of([row], tmp_path / "page.html")
    template = (ROOT / "data" / "viewer.html").read_text(encoding="utf-8")
    assert Elements(text).tags == Elements(template).tags
    assert len(re.findall("<script", text)) == len(re.findall("<script", template)) == 2
    [run] = found["runs"]
    step = run["episodes"][0]["steps"][0]
    assert run["name"] == step["state"] == step["reflection"] == step["actions"][0] == HOSTILE
    script = Elements(template).scripts[1]
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(", script), "texts become HTML"


def test_the_experts_marks(tmp_path):
    """Catches a replay from another seed, marks that are late by one step, and marks beside states that the replay did
    not come to; of an environment without an expert an error instead of no marks."""
    [row] = rows_of(envs.make("taxi"), evaluation.expert_actor, lambda: envs.make("taxi"))
    [run] = page_of([row], tmp_path / "page.html")[1]["runs"]
    for episode in run["episodes"]:
        assert [step["expert"] for step in episode["steps"]] == [step["action"] for step in episode["steps"]]
    altered = row["sampled"][0][1]
    altered.steps[-1] = dataclasses.replace(altered.steps[-1], state="another version's")
    row["sampled"][0][2].state = "another version's"
    [run] = page_of([row], tmp_path / "page.html")[1]["runs"]
    marked = [all(step["expert"] is not None for step in episode["steps"]) for episode in run["episodes"]]
    assert marked == [number not in (1, 2) for number in range(len(marked))]

    class Alone(Corridor):
        expert_action = envs.Env.expert_action

    [run] = page_of(rows_of(Alone(), evaluation.random_actor, Alone), tmp_path / "page.html")[1]["runs"]
    assert all(step["expert"] is None for episode in run["episodes"] for step in episode["steps"])


class Seeded(Corridor):
    """Its start depends on the seed of its reset."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.here = self.rng.choice([here for here in range(self.length) if here != self.goal])
        return self.render(), self.info()


def test_the_teachers_words(tmp_path):
    """Catches the teacher shown where the reflection is right, not shown where it is wrong, or with the words on
    another state; a replay with another seed than the episode's; an environment with an expert and no teacher."""

    def actor(episodes, known):
        """Reflects rightly, but for steps at cell 2."""
        steps = []
        for episode in episodes:
            reflection = "wrong" if episode.env.here == 2 else Corridor.reflection(episode.env, False)
            steps.append(Step(episode.state, episode.actions, reflection, log_probs=[math.log(0.5)] * 2))
        return steps

    [run] = page_of(rows_of(Seeded(), actor, Seeded), tmp_path / "page.html")[1]["runs"]
    wrong = 0
    for episode in run["episodes"]:
        before = None
        for step in episode["steps"]:
            here, goal = map(int, re.findall(r"\d", step["state"]))
            assert step["expert"] == int(goal > here)
            assert (step["teacher"] is None) == (here != 2)
            if here == 2:
                wrong += 1
                mistake = before is not None and before["action"] != before["expert"]
                sentence = f"The goal is {abs(goal - here)} away."
                assert step["teacher"] == ("That was a mistake. " + sentence if mistake else sentence)
            before = step
    assert wrong

    class Silent(Seeded):
        reflection = envs.Env.reflection

    [run] = page_of(rows_of(Silent(), actor, Silent), tmp_path / "page.html")[1]["runs"]
    steps = [step for episode in run["episodes"] for step in episode["steps"]]
    assert all(step["teacher"] is None and step["expert"] is not None for step in steps)


def test_a_missing_folder_is_found_before_playing(tmp_path, monkeypatch):
    """Catches an hour of play whose page cannot be written."""
    monkeypatch.setattr(evaluation, "row", lambda *args: pytest.fail("played"))
    with pytest.raises(UserError, match="--html .*page.html: there is no such folder"):
        run_script(evaluation, "--runs", tmp_path, "--html", tmp_path / "none" / "page.html", monkeypatch=monkeypatch)


def test_the_script_writes_it(tmp_path, monkeypatch):
    """Catches rows that are not in the page, settings that are not the command line's, another seed than the panel's:
    then no episode would come out as it was played, and none would be marked."""
    monkeypatch.setattr(sys.modules["corridor"], "Seeded", Seeded, raising=False)
    where = ["--env", "corridor:Seeded", "--runs", tmp_path, "--device", "cpu", "--repeats", 2]
    run_script(evaluation, *where, "--html", tmp_path / "page.html", monkeypatch=monkeypatch)
    found = json.loads(Elements((tmp_path / "page.html").read_text()).scripts[0])
    assert [(run["name"], len(run["episodes"])) for run in found["runs"]] == [("random", 10), ("expert", 10)]
    marks = [step["expert"] for run in found["runs"] for episode in run["episodes"] for step in episode["steps"]]
    assert None not in marks
    tables = (evaluation.OPTIONS, envs.beside("../models/endpoint.py").OPTIONS)
    settings = json.loads(json.dumps(vars(resolved(*where, tables=tables)), default=str))
    assert found["settings"] == settings | {"html": str(tmp_path / "page.html")}
