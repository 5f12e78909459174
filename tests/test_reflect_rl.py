"""LoRA, prompts, labels, scores, reflections, play, options: each against an independent computation."""

import copy
import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, make_players, players_on, randomise, resolved, rows_of, scaled, taxi_states
from corridor import Corridor
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import envs
import plumbing.runs
import reflect_rl
import rl
import sft
from envs import UserError
from reflect_rl import Step

MENU = ("move south", "move north", "move east", "move west", "pick up", "drop off")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


def with_adapter(folder, r=4):
    """A base with one random adapter `policy`, active."""
    model, tokenizer = reflect_rl.load_base(folder)
    torch.manual_seed(0)
    reflect_rl.add_adapter(model, "policy", r, 8)
    randomise(model, "policy")
    reflect_rl.use_adapter(model, "policy")
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------
# LoRA


def test_lora_is_the_identity_at_first(base):
    """Catches a B that is not 0 (SFT would start from a damaged base), a layer left out, an adapter on the LM head."""
    model, _ = reflect_rl.load_base(base)
    before = logits_of(model, range(5, 40))
    reflect_rl.add_adapter(model, "policy", 4, 8)
    reflect_rl.use_adapter(model, "policy")
    assert torch.equal(logits_of(model, range(5, 40)), before)
    randomise(model, "policy")
    assert not torch.allclose(logits_of(model, range(5, 40)), before, atol=1e-2), "the adapter does nothing at all"
    reflect_rl.use_adapter(model, None)
    assert torch.equal(logits_of(model, range(5, 40)), before), "the bare base is not restored"
    assert len(reflect_rl.lora_layers(model)) == 2 * (4 if "gpt2" in str(base) else 7), "two blocks' linear layers"
    assert not any("lm_head" in path for path in reflect_rl.lora_layers(model))
    assert all(p.requires_grad == (".lora_" in path) for path, p in model.named_parameters()), "the base must be frozen"


def test_lora_equals_the_merged_weight(base, tmp_path):
    """Catches a transposed A or B (Conv1D!) and a scale that is not alpha / r: W + (alpha / r) B A in a plain model.
    Many tokens, for which layers are merged, and few of them agree on every layer, gradients too. A second adapter
    changes nothing of it, and it comes back from disk under any name."""
    model, _ = with_adapter(base)
    alone = logits_of(model, range(5, 60))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    for path, layer in reflect_rl.lora_layers(model).items():
        change = 8 / 4 * layer.lora_B["policy"] @ layer.lora_A["policy"]  # (out, in)
        weight = plain.get_submodule(path).weight
        weight.data += change.T if "gpt2" in str(base) else change
        x = torch.randn(2, 200, change.shape[1], requires_grad=True)
        assert layer.merges(x) and not layer.merges(x[:, :1]) and not layer.merges(x.bfloat16())
        learned = [x, layer.lora_A["policy"], layer.lora_B["policy"]]
        merged, apart = layer(x), torch.cat([layer(x[:, i : i + 1]) for i in range(200)], dim=1)
        torch.testing.assert_close(apart, merged, atol=1e-4, rtol=1e-5)
        weights = torch.randn_like(merged)
        by_hand, by_autograd = (torch.autograd.grad((y * weights).sum(), learned) for y in (merged, apart))
        torch.testing.assert_close(by_hand, by_autograd, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(alone, logits_of(plain, range(5, 60)), atol=1e-3, rtol=1e-4)
    reflect_rl.add_adapter(model, "reflect", 8, 8)
    randomise(model, "reflect")
    reflect_rl.use_adapter(model, "reflect")
    assert not torch.allclose(logits_of(model, range(5, 60)), alone, atol=1e-2)
    reflect_rl.use_adapter(model, "policy")
    assert torch.equal(logits_of(model, range(5, 60)), alone), "the adapters disturb each other"
    reflect_rl.save_adapter(model, "policy", tmp_path)
    again, _ = reflect_rl.load_base(base)
    reflect_rl.load_adapter(again, "other", tmp_path)
    reflect_rl.use_adapter(again, "other")
    assert torch.equal(logits_of(again, range(5, 60)), alone)


TARGETS = [("gpt2", ["c_attn"]), ("gpt2", ["c_attn", "c_proj", "c_fc"]), ("llama", ["q_proj", "v_proj"])]


@pytest.mark.extra
@pytest.mark.parametrize("shape, targets", [
    *TARGETS, ("llama", "all-linear"), ("llama", "second layer"), ("gpt2", "ours"), ("llama", "ours"),
])
def test_peft_agrees(shape, targets, bases, tmp_path):
    """Catches a key, a `fan_in_fan_out` or a scale that peft reads otherwise, an adapter of peft's (partial targets,
    random B) that we read onto the wrong layers."""
    peft, plain = pytest.importorskip("peft"), AutoModelForCausalLM.from_pretrained(bases[shape])
    if targets == "ours":
        model, _ = with_adapter(bases[shape])
        reflect_rl.save_adapter(model, "policy", tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] == (shape == "gpt2") and config["base_model_name_or_path"] == str(bases[shape])
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    else:
        fields = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", "fan_in_fan_out": shape == "gpt2"}
        if targets == "second layer":
            fields, targets = fields | {"layers_to_transform": [1]}, ["q_proj", "down_proj"]
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
        theirs = peft.get_peft_model(plain, config).eval()
        theirs.save_pretrained(tmp_path)
        model, _ = reflect_rl.load_base(bases[shape])
        reflect_rl.load_adapter(model, "policy", tmp_path)
        reflect_rl.use_adapter(model, "policy")
    torch.testing.assert_close(logits_of(model, range(5, 60)), logits_of(theirs, range(5, 60)), atol=1e-4, rtol=1e-4)


FIELDS = {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"c_fc": 2}}
FIELDS |= {"alpha_pattern": {"c_fc": 2}, "trainable_token_indices": [0], "lora_bias": True, "bias": "all"}
FIELDS |= {"alora_invocation_tokens": [5], "of_another_year": 1, "peft_type": "LOHA", "r": "16", "lora_alpha": None}
FIELDS |= {"init_lora_weights": "pissa_niter_4"}
DAMAGES = ["no config", "half a config", "no weights", "half of the weights", "NaN weights", "wrong base", *FIELDS]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_whole_plain_adapter_of_this_base_is_refused(damage, bases, tmp_path):
    """Catches a traceback, a random adapter in place of a damaged one, NaN that plays, another method read as LoRA."""
    model, _ = with_adapter(bases["llama" if damage == "wrong base" else "gpt2"])
    reflect_rl.save_adapter(model, "policy", tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    file, reason = config if "config" in damage else weights, "no complete adapter"
    if damage in FIELDS:
        config.write_text(json.dumps(json.loads(config.read_text()) | {damage: FIELDS[damage]}))
        reasons = {"bias": "without biases", "peft_type": "not LOHA", "r": "no rank", "lora_alpha": "no number"}
        reason = reasons.get(damage, f"not {damage}")
    elif damage == "NaN weights":
        tensors, reason = load_file(weights), "not finite"
        next(iter(tensors.values()))[0, 0] = math.nan
        save_file(tensors, weights)
    elif damage == "wrong base":
        reason = "another base|no linear layer"
    elif damage.startswith("no "):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fresh, _ = reflect_rl.load_base(bases["gpt2"])
    with pytest.raises(UserError, match=reason):
        reflect_rl.load_adapter(fresh, "policy", tmp_path)


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_save_does_not_look_complete(call, bases, tmp_path, monkeypatch):
    """Catches a config that is there before the weights or half written (it marks a stage as done), and a save that
    damages the file it replaces: the process dies in the middle of the first or second file."""
    model, _ = with_adapter(bases["gpt2"])
    real, calls = Path.write_bytes, []

    def dying(path, content):
        calls.append(path)
        if len(calls) < call:
            return real(path, content)
        real(path, content[: len(content) // 2])
        raise Killed

    monkeypatch.setattr(Path, "write_bytes", dying)
    with pytest.raises(Killed):
        reflect_rl.save_adapter(model, "policy", tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    (tmp_path / "text").write_text("old")
    with pytest.raises(Killed):
        plumbing.runs.write(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "old"


# ---------------------------------------------------------------------------------------------------------
# Prompts and labels


def test_prompts_have_the_documented_layout():
    """Catches a prompt that differs between SFT, RL and the design page: one character is another distribution."""
    assert reflect_rl.reflector_prompt("S") == "S\n# Analyze:\n"
    prompt = reflect_rl.policy_prompt("S", " why\n\n so ", ("go", "stop"), ["A", "B"])
    assert prompt == "S\n# Analyze:\nwhy so\n# Actions:\nA go\nB stop\n# Action:\n", "a reflection is one line"
    assert reflect_rl.policy_prompt("S", None, ("go",), ["A"]) == "S\n# Actions:\nA go\n# Action:\n"


def test_tokenizers_are_the_kinds_they_claim(tokenizers, bases):
    """The fixtures themselves: without these properties the label test would catch nothing."""
    length = {name: len(t("10", add_special_tokens=False)["input_ids"]) for name, t in tokenizers.items()}
    assert length == {"digit-splitting": 2, "GPT-2-like": 1, "SentencePiece-like": 1}
    llama = tokenizers["SentencePiece-like"]
    assert llama("x")["input_ids"][0] == llama.bos_token_id and llama.tokenize("A")[0].startswith("▁")
    assert "<0x0A>" in llama.tokenize("a\nb")
    for shape, kind in (("gpt2", "digit-splitting"), ("llama", "SentencePiece-like"), ("mistral", "GPT-2-like")):
        _, loaded = reflect_rl.load_base(bases[shape])
        assert loaded("# Analyze:\nat 10")["input_ids"] == tokenizers[kind]("# Analyze:\nat 10")["input_ids"], shape
        assert loaded.decode(loaded("row 10.\nA", add_special_tokens=False)["input_ids"]).strip() == "row 10.\nA"


def test_text_stays_text(tokenizer):
    """Catches a repository's file whose text ends the prompt by a special token, a batch that is tokenized otherwise
    than its texts, and prompts that end with the tokenizer's own EOS."""
    special, texts = set(tokenizer.all_special_ids), []
    for token in tokenizer.all_special_tokens:
        texts += [f"cat {token} shows{token}", token, f"{token}{token}x"]
    rows = reflect_rl.encode_all(tokenizer, [*texts, "", "plain text"])
    for text, ids in zip(texts, rows, strict=False):
        body = ids[1:] if tokenizer.bos_token else ids
        assert not special.intersection(body) and tokenizer.decode(body).strip() == text
        assert ids == reflect_rl.encode(tokenizer, text)
    assert rows[-1] == tokenizer("plain text")["input_ids"] and reflect_rl.encode_all(tokenizer, []) == []
    eager, eos = copy.deepcopy(tokenizer), tokenizer.eos_token
    closing = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
    eager.backend_tokenizer.post_processor = closing
    assert eager("a b")["input_ids"][-1] == tokenizer.eos_token_id
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert reflect_rl.encode(eager, "a b") == plain and not reflect_rl.encode(eager, "")


MENUS = (
    MENU,
    ("cat espresso.md", "cat prices.csv", "cd ..", "cd prices", "id espresso.md", "id prices.csv"),
    ("go to drawer 1", "go to drawer 2", "go to drawer 10", "look", "take mug 1 from desk 1", "examine drawer 1"),
    ("cat Zürich.md", "cat \\udcff.bin", "cat 😀", "cat \\n", "-", "?"),
    ("same", "same", "same"),
    ("A", "A", "A"),
)


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_labels_are_single_distinct_tokens_behind_any_prompt(kind, tokenizer):
    """Catches "10" as a label of a digit-splitting tokenizer, SentencePiece's prefix space, two labels with one token,
    labels that depend on what stands before them, a word of another action."""
    labels_of = reflect_rl.Labels(tokenizer, kind)
    letters = list(labels_of.letters.values())
    assert letters[:4] == ["A", "B", "C", "D"] and len(letters) > 62, "short words follow"
    for actions in (*MENUS, tuple(f"go to {i}" for i in range(len(letters)))):
        labels, ids = labels_of(actions)
        assert len(labels) == len(ids) == len(set(ids)) == len(set(labels)) == len(actions)
        for state in (taxi_states(3)[-1], "", "Zürich 10 10\n"):
            prompt = reflect_rl.policy_prompt(state, "Why? 3", actions, labels)
            before = reflect_rl.encode(tokenizer, prompt)
            for label, token in zip(labels, ids, strict=True):
                assert reflect_rl.encode(tokenizer, prompt + label) == [*before, token], f"label {label!r}"
        if kind == "letters":
            assert list(labels) == letters[: len(actions)], "in the menu's order, whatever the actions say"
        own = [label.strip() in action for label, action in zip(labels, actions, strict=True)]
        for label, is_own in zip(labels, own, strict=True):
            assert is_own or label in letters
        assert kind == "letters" or len(actions) > 6 or sum(own) >= len(set(actions)) - 1, labels


def test_words_tell_the_actions_apart(tokenizers):
    """Catches a word that many actions share where one has a better, and words that change with the menu's order."""
    words = reflect_rl.Labels(tokenizers["GPT-2-like"], "words")
    labels, _ = words(("x a b", "x a c", "x a d", "y", "z a b"))
    assert [label.strip() for label in labels] == ["b", "c", "d", "y", "z"]
    menu = ("a b", "a", "b")
    named = dict(zip(menu, words(menu)[0], strict=True))
    assert dict(zip(menu[::-1], words(menu[::-1])[0], strict=True)) == named
    assert words(("x", "x"))[0][1] in words.letters.values()


def test_too_few_labels_names_both_counts(bases):
    """Catches actions that silently have no label, and a misspelt kind of labels that quietly means letters."""
    players = make_players(bases["gpt2"])
    have = len(players.labels.letters)
    players.steps(["S"], [("go",) * have], [None])
    with pytest.raises(UserError, match=rf"{have + 1}\D+{have}\D"):
        players.steps(["S"], [("go",) * (have + 1)], [None])
    with pytest.raises(UserError, match="without any action"):
        players.steps(["S"], [()], [None])
    with pytest.raises(UserError, match="wrds"):
        reflect_rl.Labels(players.tokenizer, "wrds")


# ---------------------------------------------------------------------------------------------------------
# Scores


def alone(players, step, adapter="policy"):
    """The slow way: one prompt, no padding, all logits of the whole model, restricted to the menu, in fp64."""
    reflect_rl.use_adapter(players.model, adapter)
    ids = reflect_rl.encode(players.tokenizer, step.prompt)
    return logits_of(players.model, ids)[-1].double()[list(step.label_ids)].log_softmax(-1).tolist()


def some_steps(players):
    """Steps with prompts of different lengths and with different numbers of actions."""
    menus = [MENU[:n] for n in (6, 2, 1, 5, 6, 3)]
    reflections = ["short.", None, "The taxi is at row 10 column 10. " * 3, "", "x" * 40, None]
    return players.steps(taxi_states(6), menus, reflections)


def assert_right(steps, players, adapter="policy"):
    for step in steps:
        assert len(step.log_probs) == len(step.label_ids) == len(step.actions) and min(step.log_probs) > -math.inf
        assert step.log_probs == pytest.approx(alone(players, step, adapter), abs=1e-5)


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_scores_equal_the_full_models(kind, players):
    """Catches left padding without positions or mask, a wrong last position, a leak between rows, invalid actions in
    the softmax, dropout: every step against the whole model on its prompt alone, in any company and micro-batch."""
    players.labels = reflect_rl.Labels(players.tokenizer, kind)
    steps, rows = some_steps(players), rows_of(players.model)
    assert len({len(step.ids) for step in steps}) > 3, "the batch needs padding for this test to mean anything"
    for micro_batch, order in ((32, steps[2:] + steps * 2), (2, steps[::-1]), (1, steps), (5, steps * 2)):
        players.micro_batch = micro_batch
        copies = [dataclasses.replace(step) for step in order]
        rows.clear()
        players.score(copies)
        assert max(rows) <= micro_batch and (micro_batch < 32 or rows == [6]), "equal prompts share a row"
        assert_right(copies, players)
    players.score(steps, adapter="reflect")
    assert_right(steps, players, "reflect")
    with torch.no_grad():
        table = players.log_probs(players.forward(steps), steps)
    assert table.dtype == torch.float32 and table.shape == (6, 6)
    for row, step in zip(table, steps, strict=True):
        assert row[: len(step.label_ids)].tolist() == pytest.approx(alone(players, step), abs=1e-5)
        assert torch.all(row[len(step.label_ids) :] == -torch.inf)
        assert row.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_scores_go_through_the_models_own_forward(kind, tokenizers):
    """Catches features times the head in place of the logits: these models cap or scale theirs."""
    players = players_on(scaled(kind, len(tokenizers["digit-splitting"])), tokenizers["digit-splitting"])
    steps = some_steps(players)
    players.score(steps)
    assert_right(steps, players)


def test_padding_is_told_by_length_not_by_id(bases):
    """Catches a mask built from ids: here the pad id is EOS, and a row begins with it."""
    players, rows = make_players(bases["gpt2"]), [[0, 0, 7], [5, 6, 7, 8, 9, 0, 11]]
    steps = [Step("", MENU, prompt=str(row), ids=row) for row in rows]
    with torch.no_grad():
        for found, row in zip(players.forward(steps), rows, strict=True):
            torch.testing.assert_close(found, logits_of(players.model, row)[-1], atol=1e-4, rtol=0)


def test_rollout_and_update_agree(base):
    """Catches a rollout that scores otherwise than the update, and weights of an earlier call of `play`."""
    players, make_env = make_players(base), lambda: envs.make("taxi")
    tasks, episodes = make_env().tasks("train")[:12], []
    for scale in (1.0, 1.5):
        for weight in reflect_rl.adapter_parameters(players.model, "policy"):
            weight.data *= scale
        episodes = reflect_rl.play(players, make_env, tasks, batch=5)
        steps = [step for episode in episodes for step in episode.steps]
        assert len({step.reflection for step in steps}) > 1
        table = players.log_probs(players.forward(steps), steps)  # as the update does it
        assert table.requires_grad
        for row, step in zip(table.tolist(), steps, strict=True):
            assert row[step.action] == pytest.approx(step.log_prob, abs=1e-5)
        assert_right(steps[::5], players)


def test_a_state_that_comes_back_is_decided_as_before(bases):
    """Catches equal states of a turn or of later turns that are computed again, and steps that share their action."""
    players, known, episodes = make_players(bases["gpt2"], reflection=False), {}, []
    for state in "aba":
        episodes.append(reflect_rl.Episode(0, None))
        episodes[-1].state, episodes[-1].actions = state, MENU
    rows = rows_of(players.model)
    first = players(episodes, known)
    again = players(episodes[::-1], known)
    assert rows == [2] and [step.state for step in again] == ["a", "b", "a"]
    assert len(set(map(id, first + again))) == 6 and again[0].log_probs == first[0].log_probs


def test_long_prompt_is_an_error_not_a_cut(bases):
    """Catches left truncation, which cuts the question off, and a reflection that has no room."""
    players = make_players(bases["llama"])
    steps = players.steps(["word " * 600], [MENU], [None])
    for refused in (lambda: players.score(steps), lambda: players.reflect(["word " * 600])):
        with pytest.raises(UserError, match="context of 512"):
            refused()
    length = len(reflect_rl.encode(players.tokenizer, reflect_rl.reflector_prompt("S")))
    make_players(bases["llama"], max_reflection=512 - length).reflect(["S"])
    with pytest.raises(UserError, match=f"{length} tokens, and {513 - length} to write"):
        make_players(bases["llama"], max_reflection=513 - length).reflect(["S"])


def test_gradient_reaches_the_policy_only(players):
    """Catches a reflector or base that learns with the policy."""
    steps = some_steps(players)
    players.log_probs(players.forward(steps), steps)[:, 0].sum().backward()
    for path, parameter in players.model.named_parameters():
        is_policy = ".lora_" in path and path.endswith("policy")
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == is_policy, path


# ---------------------------------------------------------------------------------------------------------
# Reflections


def hf_greedy(players, state, limit=12):
    """What Hugging Face's own `generate` writes behind one prompt: the new ids up to EOS, and whether it was cut."""
    reflect_rl.use_adapter(players.model, "reflect")
    ids = torch.tensor([reflect_rl.encode(players.tokenizer, reflect_rl.reflector_prompt(state))])
    eos = players.tokenizer.eos_token_id
    options = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": eos, "pad_token_id": eos}
    out = players.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    return (out[: out.index(eos)], False) if eos in out else (out, True)


def choose_eos(players, states):
    """Make a token EOS that the random model writes early for some states only: rows stop at different times."""
    written = [hf_greedy(players, state)[0] for state in states]
    for token in sorted({t for tokens in written for t in tokens[1:]}):
        if 0 < sum(token in tokens for tokens in written) < len(written):
            players.tokenizer.eos_token = players.tokenizer.convert_ids_to_tokens(token)
            return
    raise AssertionError("no token tells the states apart: the fixture is of no use")


def test_reflections_equal_hugging_faces(players):
    """Catches wrong positions or a wrong cache behind left padding, rows mixed up when one leaves the batch, EOS not
    honoured, padding in the text, a batch mate that matters: ragged batches against `generate` on each state alone."""
    states = taxi_states(8)
    choose_eos(players, states)
    expected, cuts = [], 0
    for state in states:
        ids, cut = hf_greedy(players, state)
        text, cuts = " ".join(players.tokenizer.decode(ids).split()), cuts + cut
        expected.append(text[: text.rfind(".") + 1] if cut and "." in text else text)
    assert 0 < cuts < 8 and len(set(expected)) > 3, "some rows must stop and some be cut"
    rows = rows_of(players.model)
    for micro_batch in (32, 3, 1):
        players.micro_batch = micro_batch
        players.reflections.clear()
        players.counts.clear()
        rows.clear()
        assert players.reflect(states) == expected and max(rows) == min(micro_batch, 8)
        assert dict(players.counts) == {"misses": 8, "hits": 0, "cuts": cuts}


CLOSED = [("Two words.", False, "Two words."), (" One\nline \n only ", False, "One line only"), ("", True, "")]
CLOSED += [("Whole. Hal", True, "Whole."), ("One. Two. Thr", True, "One. Two."), ("no stop", True, "no stop")]


@pytest.mark.parametrize("text, cut, closed", CLOSED)
def test_cut_reflection_ends_with_a_whole_sentence(text, cut, closed, bases, monkeypatch):
    """Catches half a sentence in the prompt, of which SFT never showed the policy one."""
    players = make_players(bases["gpt2"], max_reflection=3)
    if not cut:
        third = hf_greedy(players, "S")[0][2]
        players.tokenizer.eos_token = players.tokenizer.convert_ids_to_tokens(third)
    monkeypatch.setattr(type(players.tokenizer), "decode", lambda self, ids: text)
    assert players.reflect(["S"]) == [closed] and players.counts["cuts"] == cut


def test_reflections_are_remembered(bases):
    """Catches a memo that is not used, equal states of a batch that are each decoded, memory that grows with every new
    state, an answer lost because it was evicted at once."""
    players, free = make_players(bases["gpt2"]), make_players(bases["gpt2"])
    a, b, *rest = taxi_states(6)
    assert players.can_pad  # asked of the model once
    rows = rows_of(players.model)
    first = players.reflect([a, b, a])
    assert rows[0] == 2 and first[0] == first[2] and dict(players.counts) == {"misses": 2, "hits": 1, "cuts": 2}
    rows.clear()
    assert players.reflect([b, a]) == [first[1], first[0]] and not rows and players.counts["hits"] == 3
    players.memo_size = 3
    assert players.reflect([*rest, b, a]) == free.reflect([*rest, b, a])
    assert list(players.reflections) == rest[-3:]
    assert players.reflect([a, b]) == free.reflect([a, b]) and list(players.reflections) == [rest[-1], a, b]


# ---------------------------------------------------------------------------------------------------------
# Play


class Countdown(envs.Env):
    """Task n lasts n steps; rewards show the env's own seed; ends alternate between success, failure, truncation.

    It returns one dict with one list, and changes them at each step; numbers and flags are numpy's.
    """

    made, seen = 0, []

    def __init__(self):
        Countdown.made += 1
        self.shared = {"actions": []}

    def reset(self, *, seed=None, options=None):
        Countdown.seen.append(options)
        self.n, self.rng = options["task"], random.Random(seed)
        self.left = self.n
        return self.render(False)

    def render(self, success):
        self.shared["actions"][:] = [f"a{self.left}", f"b{self.left}"]
        self.shared["success"] = np.bool_(success)
        return f"{self.left} of {self.n}", self.shared

    def step(self, action):
        self.left -= 1
        over, kind = self.left == 0, self.n % 3
        state, info = self.render(over and kind == 0)
        return state, np.float32(self.rng.random()), np.bool_(over and kind != 2), np.bool_(over and kind == 2), info


def coin(episodes, known, weights=(0.3, 0.7)):
    steps = []
    for episode in episodes:
        log_probs = [math.log(weight) if weight else -math.inf for weight in weights]
        steps.append(Step(episode.state, episode.actions, f"on {episode.state}", log_probs=log_probs))
    return steps


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_play_does_not_depend_on_the_batch(batch):
    """Catches an RNG shared between episodes, results in order of completion, options that do not arrive, a batch that
    runs dry while tasks wait, an environment for every task."""
    tasks, widths, options = [5, 1, 3, 3, 8, 2, 1, 7, 4, 6], [], {"easy": True}
    Countdown.made, Countdown.seen = 0, []

    def watched(episodes, known):
        widths.append(len(episodes))
        return coin(episodes, known)

    episodes = reflect_rl.play(watched, Countdown, tasks, options, seed=3, batch=batch)
    assert Countdown.made == min(batch, 10) and max(widths) == min(batch, 10) and sum(widths) == sum(tasks)
    assert widths == sorted(widths, reverse=True), "a free environment gets the next task at once"
    assert Countdown.seen == [{"easy": True, "task": task} for task in tasks] and options == {"easy": True}
    assert [episode.task for episode in episodes] == tasks and [len(e.steps) for e in episodes] == tasks
    for i, task in enumerate(tasks):
        [single] = reflect_rl.play(coin, Countdown, [task], seed=3, numbers=[i])
        assert vars(episodes[i]) == vars(single)
    assert episodes[2].steps != episodes[3].steps, "two episodes of one task must differ"
    [other] = reflect_rl.play(coin, Countdown, [5], seed=4)
    assert [step.reward for step in other.steps] != [step.reward for step in episodes[0].steps]


def test_steps_carry_what_happened():
    """Catches swapped flags, success inferred from reward, the state after in place of the state before, a menu that
    the environment changed afterwards, numpy's numbers, which neither JSON nor a checkpoint takes."""
    episodes = reflect_rl.play(coin, Countdown, [3, 1, 2])
    ends = [(e.terminated, e.truncated, e.success, e.over) for e in episodes]
    assert ends == [(True, False, True, True), (True, False, False, True), (False, True, False, True)]
    steps = episodes[0].steps
    assert [s.state for s in steps] == ["3 of 3", "2 of 3", "1 of 3"]
    assert [s.actions for s in steps] == [("a3", "b3"), ("a2", "b2"), ("a1", "b1")]
    assert episodes[0].state == "0 of 3" and episodes[0].actions == ("a0", "b0")
    assert all(s.reflection == f"on {s.state}" and s.log_prob == s.log_probs[s.action] for s in steps)
    assert {type(s.reward) for s in steps} == {float} and {type(flag) for flags in ends for flag in flags} == {bool}
    assert episodes[0].total == sum(s.reward for s in steps) and episodes[0].env is None


def test_actions_are_sampled_as_their_probabilities():
    """Catches sampling at another temperature, greedy play by default, an action without probability taken."""

    class Three(Countdown):
        def render(self, success):
            return "s", {"actions": ("a", "b", "c"), "success": success}

    def actor(episodes, known):
        return coin(episodes, known, (0.2, 0, 0.8))

    taken = [e.steps[0].action for e in reflect_rl.play(actor, Three, [1] * 4000)]
    assert 1 not in taken
    assert abs(taken.count(0) / 4000 - 0.2) < 5 * math.sqrt(0.16 / 4000), "five standard errors off"
    assert {e.steps[0].action for e in reflect_rl.play(actor, Three, [1] * 9, greedy=True)} == {2}


def test_show():
    """Catches a viewer that shows less than state, reflection, menu with probabilities, choice, reward, outcome."""
    episode = reflect_rl.Episode(0, None)
    log_probs = [math.log(0.25), math.log(0.75)]
    episode.steps = [Step("at 1", ("go", "stop"), "Go on.", log_probs=log_probs, action=1, reward=-0.5)]
    episode.steps.append(Step("at 2", ("go",), None, log_probs=[0.0], action=0, reward=1.0))
    lines = ["at 1", "# Analyze:", "Go on.", "     25.0%  go", "  >  75.0%  stop", "reward -0.50", ""]
    lines += ["at 2", "  > 100.0%  go", "reward +1.00", ""]
    for fields, word in (({"success": True}, "success"), ({"terminated": True}, "failure"), ({}, "out of time")):
        vars(episode).update({"success": False, "terminated": False} | fields)
        assert reflect_rl.show(episode) == "\n".join([*lines, f"{word} after 2 steps, return +0.50"])


def test_micro_batch_bounds_every_forward_pass(bases):
    """Catches held-out records or critic values in one batch whatever --micro-batch says."""
    players = make_players(bases["gpt2"], micro_batch=3, max_reflection=4)
    rows, critic = rows_of(players.model), rl.Critic(32)
    episodes = reflect_rl.play(players, lambda: envs.make("taxi"), list(range(1, 480, 40)))
    steps = [step for episode in episodes for step in episode.steps]
    values = rl.values_of(steps[:8], players, critic)
    assert len(values) == 8
    records, _ = sft.negatives.make_records(Corridor, 3, 0.5, seed=0)
    for stage in ("reflect", "policy"):
        sft.held_out(players, records, stage)
    assert len(rows) > 20 and max(rows) == 3


# ---------------------------------------------------------------------------------------------------------
# Options

TABLE = {
    "whole": (3, "an int", 1),
    "share": (0.5, "a float", 0.0),
    "kind": ("a", "one of", ("a", "b")),
    "flag": (False, "off by default"),
    "habit": (True, "on by default"),
    "text": ("", "a text"),
}


def parsed(*options):
    return vars(resolved("--env", "corridor:Corridor", "--device", "cpu", *options, tables=(TABLE,)))


def test_options_are_what_was_typed(tmp_path):
    found = parsed()
    assert {key: found[key] for key in TABLE} == {key: row[0] for key, row in TABLE.items()}
    found = parsed("--whole", "7", "--share", "0", "--kind", "b", "--flag", "--no-habit", "--text", "x")
    assert [found[key] for key in TABLE] == [7, 0.0, "b", True, False, "x"]
    found = parsed("--env-option", "a=b=c", "--env-option", "n=3", "--env-option", "x=", "--repos", "r")
    assert found["env_option"] == [("a", "b=c"), ("n", 3), ("x", ""), ("repos", str(Path("r").absolute()))]
    assert parsed()["env_option"] == [], "the options of the last call stay"
    assert parsed("--base", "tests")["base"] == str(Path("tests").absolute()) and parsed()["base"] == "nano"


WRONG = ["--whole 0", "--whole 1.5", "--whole nan", "--share nan", "--share -0.1", "--kind c", "--shar 1", "--habit"]


@pytest.mark.parametrize("wrong", [*WRONG, "--env-option 3", "--env-option a-b=3", "--seed x", "--micro-batch 0"])
def test_wrong_options_are_refused(wrong, capsys):
    """Catches a NaN that passes comparisons, a sign that turns a gradient round, a typo taken for an abbreviation."""
    with pytest.raises(SystemExit) as end:
        parsed(*wrong.split())
    assert end.value.code == 2 and wrong.split()[0] in capsys.readouterr().err


def test_environments_have_settings_of_their_own(monkeypatch):
    """Catches an environment's settings that win over what the user gave, or that stay for the next environment."""
    monkeypatch.setattr(Corridor, "settings", {"trajectories": 77, "negatives": 0.25, "labels": "words"})

    def found(*options):
        args = resolved("--device", "cpu", *options, tables=(sft.DATA_OPTIONS,))
        return args.trajectories, args.negatives, args.labels

    corridor = ("--env", "corridor:Corridor")
    assert found(*corridor) == (77, 0.25, "words") and found() == (200, 0.5, "letters")
    assert found(*corridor, "--trajectories", "200", "--labels", "letters") == (200, 0.25, "letters")
    assert found(*corridor, "--no-negatives") == (77, 0.0, "words")
    with pytest.raises(UserError, match="--device cuda:99 cannot be used"):
        found("--device", "cuda:99")
