"""LoRA, prompts, labels, scoring, reflections, play, checkpoints: each against an independent computation."""

import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, make_players, randomise, subprocess_of, taxi_states
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import envs
import reflect_rl
from envs import UserError
from reflect_rl import Players

MENU = ("move south", "move north", "move east", "move west", "pick up", "drop off")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


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
    """Catches a B that is not 0: SFT would start from a damaged base. A random B must make a difference."""
    model, _ = reflect_rl.load_base(base)
    before = logits_of(model, range(5, 40))
    reflect_rl.add_adapter(model, "policy", 4, 8)
    reflect_rl.use_adapter(model, "policy")
    assert torch.equal(logits_of(model, range(5, 40)), before)
    randomise(model, "policy")
    assert not torch.allclose(logits_of(model, range(5, 40)), before, atol=1e-2), "the adapter does nothing at all"
    reflect_rl.use_adapter(model, None)
    assert torch.equal(logits_of(model, range(5, 40)), before), "the bare base is not restored"


def test_lora_equals_the_merged_weight(base):
    """Catches a transposed A or B (Conv1D!) and a scale that is not alpha / r: W + (alpha / r) B A in a plain model."""
    model, _ = with_adapter(base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    for path, layer in reflect_rl.lora_layers(model).items():
        change = 8 / 4 * layer.lora_B["policy"] @ layer.lora_A["policy"]  # (out, in)
        weight = plain.get_submodule(path).weight
        weight.data += change.T if "gpt2" in str(base) else change
    torch.testing.assert_close(logits_of(model, range(5, 60)), logits_of(plain, range(5, 60)), atol=1e-3, rtol=1e-4)


def test_play_and_update_agree_on_every_layer(base):
    """Catches a layer that in play, where its weight is merged for many tokens, is not what the update learns from."""
    model, _ = with_adapter(base)
    for layer in reflect_rl.lora_layers(model).values():
        x = torch.randn(2, 200, layer.in_features)
        with torch.no_grad():
            assert layer.merging_pays(x) and not layer.merging_pays(x[:, :1]) and not layer.merging_pays(x.bfloat16())
            merged = layer(x)
        assert not layer.merging_pays(x)
        torch.testing.assert_close(layer(x), merged, atol=1e-4, rtol=1e-5)


def test_lora_adapts_every_layer_but_the_head(base):
    """Catches a layer left out: attention and MLP of each of the two blocks; and an adapter on the LM head."""
    model, _ = with_adapter(base)
    per_block = 4 if "gpt2" in str(base) else 7
    assert len(reflect_rl.lora_layers(model)) == 2 * per_block
    assert not any("lm_head" in path for path in reflect_rl.lora_layers(model))
    assert all(p.requires_grad == (".lora_" in path) for path, p in model.named_parameters()), "the base must be frozen"


def test_adapters_do_not_disturb_each_other(base):
    """Catches adapters that share weights or add up: each alone gives what it gives in the company of the other."""
    model, _ = with_adapter(base)
    alone = logits_of(model, range(5, 30))
    reflect_rl.add_adapter(model, "reflect", 8, 8)
    randomise(model, "reflect")
    reflect_rl.use_adapter(model, "reflect")
    other = logits_of(model, range(5, 30))
    reflect_rl.use_adapter(model, "policy")
    assert torch.equal(logits_of(model, range(5, 30)), alone) and not torch.allclose(other, alone, atol=1e-2)


def test_adapter_survives_saving(base, tmp_path):
    model, _ = with_adapter(base)
    reflect_rl.save_adapter(model, "policy", tmp_path)
    again, _ = reflect_rl.load_base(base)
    reflect_rl.load_adapter(again, "reflect", tmp_path)  # under any name
    reflect_rl.use_adapter(again, "reflect")
    assert torch.equal(logits_of(again, range(5, 30)), logits_of(model, range(5, 30)))


@pytest.mark.extra
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_peft_loads_our_adapter(shape, bases, tmp_path):
    """Catches a key, a `fan_in_fan_out` or a scale that peft reads otherwise."""
    peft = pytest.importorskip("peft")
    model, _ = with_adapter(bases[shape])
    reflect_rl.save_adapter(model, "policy", tmp_path)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[shape]), tmp_path).eval()
    torch.testing.assert_close(logits_of(theirs, range(5, 60)), logits_of(model, range(5, 60)), atol=1e-4, rtol=1e-4)


@pytest.mark.extra
@pytest.mark.parametrize(
    "shape, targets",
    [
        ("gpt2", ["c_attn"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("llama", ["q_proj", "v_proj"]),
        ("llama", "all-linear"),
    ],
)
def test_we_load_pefts_adapter(shape, targets, bases, tmp_path):
    """Catches an adapter read onto the wrong layers: partial targets, peft's own random B."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=shape == "gpt2",
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[shape]), config).eval()
    theirs.save_pretrained(tmp_path)
    model, _ = reflect_rl.load_base(bases[shape])
    reflect_rl.load_adapter(model, "policy", tmp_path)
    reflect_rl.use_adapter(model, "policy")
    torch.testing.assert_close(logits_of(model, range(5, 60)), logits_of(theirs, range(5, 60)), atol=1e-4, rtol=1e-4)


def test_adapter_of_another_base_is_refused(bases, tmp_path):
    """Catches weights that are loaded where they do not belong, or silently not at all."""
    model, _ = with_adapter(bases["llama"])
    reflect_rl.save_adapter(model, "policy", tmp_path)
    other, _ = reflect_rl.load_base(bases["gpt2"])
    with pytest.raises(UserError):
        reflect_rl.load_adapter(other, "policy", tmp_path)


@pytest.mark.parametrize("damage", ["no config", "half a config", "no weights", "half the weights", "dora"])
def test_damaged_adapter_is_a_user_error(damage, bases, tmp_path):
    """Catches a traceback, or a random adapter, in place of the damaged one."""
    model, _ = with_adapter(bases["gpt2"])
    reflect_rl.save_adapter(model, "policy", tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if damage.startswith("no"):
        (config if "config" in damage else weights).unlink()
    elif damage == "dora":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    else:
        file = config if "config" in damage else weights
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fresh, _ = reflect_rl.load_base(bases["gpt2"])
    with pytest.raises(UserError):
        reflect_rl.load_adapter(fresh, "policy", tmp_path)


def test_a_killed_adapter_save_does_not_look_complete(bases, tmp_path, monkeypatch):
    """Catches a config file that appears, empty, before it is written: `adapter_config.json` marks a stage as done."""
    model, _ = with_adapter(bases["gpt2"])

    def killed(path, text, *rest, **more):
        path.touch()  # what `open(path, "w")` has done before the first byte
        raise Killed

    monkeypatch.setattr(Path, "write_text", killed)
    try:
        reflect_rl.save_adapter(model, "policy", tmp_path)
    except Killed:
        assert not (tmp_path / "adapter_config.json").exists(), (
            "an empty adapter_config.json passes for a finished stage"
        )


# ---------------------------------------------------------------------------------------------------------
# Prompts and labels


def test_prompts_have_the_documented_layout():
    """Catches a prompt that differs between SFT, RL and the design page: one character is another distribution."""
    assert reflect_rl.reflector_prompt("S") == "S\n# Analyze:\n"
    assert (
        reflect_rl.policy_prompt("S", "why", ("go", "stop"), ["A", "B", "C"])
        == "S\n# Analyze:\nwhy\n# Actions:\nA go\nB stop\n# Action:\n"
    )
    assert reflect_rl.policy_prompt("S", None, ("go",), ["A"]) == "S\n# Actions:\nA go\n# Action:\n"
    assert reflect_rl.policy_prompt("S", "why", ("go",), ["A"]).startswith(reflect_rl.reflector_prompt("S") + "why")


def test_labels_are_single_distinct_tokens_behind_any_prompt(tokenizer):
    """Catches "10" as a label of a digit-splitting tokenizer, SentencePiece's prefix space, two labels with one token,
    labels that depend on what stands before them."""
    labels, ids = reflect_rl.action_labels(tokenizer)
    assert len(labels) == len(ids) == len(set(ids)) == len(set(labels)) >= 52
    for state in (*taxi_states(3), "", "Zürich 10 10\n"):
        prompt = reflect_rl.policy_prompt(state, "Why? 3", MENU, labels)
        before = reflect_rl.encode(tokenizer, prompt)
        for label, token in zip(labels, ids, strict=True):
            assert reflect_rl.encode(tokenizer, prompt + label) == [*before, token], f"label {label!r}"


MENUS = (
    ("cat espresso.md", "cat prices.csv", "cd ..", "cd prices", "id espresso.md", "id prices.csv"),
    ("go to drawer 1", "go to drawer 2", "go to drawer 10", "look", "take mug 1 from desk 1", "examine drawer 1"),
    ("cat Zürich.md", "cat \\udcff.bin", "cat 😀", "cat \\n", "-", "?"),
    ("same", "same", "same"),
    ("A", "A", "A"),
)


@pytest.mark.parametrize("actions", MENUS)
def test_words_are_single_distinct_tokens_of_their_actions(actions, tokenizer):
    """Catches a word that is two tokens behind a prompt, that two actions share, or that is another action's."""
    words = reflect_rl.Labels(tokenizer, "words")
    labels, ids = words(actions)
    assert len(labels) == len(ids) == len(set(ids)) == len(set(labels)) == len(actions)
    prompt = reflect_rl.policy_prompt("S", "Why? 3", actions, labels)
    before, own = reflect_rl.encode(tokenizer, prompt), 0
    for label, token, action in zip(labels, ids, actions, strict=True):
        assert reflect_rl.encode(tokenizer, prompt + label) == [*before, token], f"label {label!r}"
        assert label.strip() in action or label in words.letters
        own += label.strip() in action
    assert own >= len(set(actions)) - 1, labels


def test_words_tell_the_actions_apart(tokenizers):
    """Catches a word that many actions share where one has a better, and words that change with the menu's order."""
    words = reflect_rl.Labels(tokenizers["GPT-2-like"], "words")
    menu = ("x a b", "x a c", "x a d", "y", "z a b")
    named = dict(zip(menu, words(menu)[0], strict=True))
    assert [label.strip() for label in named.values()] == ["b", "c", "d", "y", "z"]
    menu = ("a b", "a", "b")
    named = dict(zip(menu, words(menu)[0], strict=True))
    assert dict(zip(menu[::-1], words(menu[::-1])[0], strict=True)) == named
    assert words(("x", "x"))[0][1] in words.letters


def test_other_labels_are_refused(tokenizers):
    """Catches a misspelt kind (an environment's `settings` are not checked by argparse) that quietly means letters."""
    with pytest.raises(UserError, match="wrds"):
        reflect_rl.Labels(tokenizers["GPT-2-like"], "wrds")


def test_letters_follow_the_menu(tokenizer):
    """Catches letters that depend on what the actions say, and words where letters were asked for."""
    letters = reflect_rl.Labels(tokenizer)
    assert list(letters(("b", "a", "A B"))[0]) == letters.letters[:3] and letters(("x",))[1] == tuple(letters.ids[:1])


def test_tokenizers_are_the_kinds_they_claim(tokenizers):
    """The fixtures themselves: without these properties the label test would catch nothing."""
    length = {name: len(t("10", add_special_tokens=False)["input_ids"]) for name, t in tokenizers.items()}
    assert length == {"digit-splitting": 2, "GPT-2-like": 1, "SentencePiece-like": 1}
    llama = tokenizers["SentencePiece-like"]
    assert llama("x")["input_ids"][0] == llama.bos_token_id and llama.tokenize("A")[0].startswith("▁")
    assert "<0x0A>" in llama.tokenize("a\nb")
    assert all(
        t.decode(t("to row 10.\nA", add_special_tokens=False)["input_ids"]).strip() == "to row 10.\nA"
        for t in tokenizers.values()
    )


def test_saved_tokenizers_load_unchanged(bases, tokenizers):
    """The fixtures again: `AutoTokenizer` must give back what was saved, BOS habit and all."""
    for shape, kind in (("gpt2", "digit-splitting"), ("llama", "SentencePiece-like"), ("mistral", "GPT-2-like")):
        _, loaded = reflect_rl.load_base(bases[shape])
        assert loaded("# Analyze:\nat 10")["input_ids"] == tokenizers[kind]("# Analyze:\nat 10")["input_ids"], shape


def test_encode_drops_a_closing_eos_only(tokenizers):
    """Catches prompts that end with the tokenizer's EOS (then the reflector would be asked to go on behind its end)."""
    tokenizer = tokenizers["GPT-2-like"]

    def eager(text):
        return {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}

    eager.eos_token_id = tokenizer.eos_token_id
    assert reflect_rl.encode(eager, "a b") == reflect_rl.encode(tokenizer, "a b") == tokenizer("a b")["input_ids"]


def test_too_few_labels_names_both_counts(bases):
    """Catches actions that silently have no label: `zip` would just drop them."""
    players = make_players(bases["gpt2"])
    have = len(players.labels.ids)
    with pytest.raises(UserError, match=rf"{have + 1}\D+{have}\D"):
        players.prompt("S", None, ["go"] * (have + 1))
    players.prompt("S", None, ["go"] * have)


# ---------------------------------------------------------------------------------------------------------
# Scoring


def full_model_log_probs(players, prompt, menu, adapter="policy"):
    """The slow way: one prompt, no padding, all logits of the whole model, restricted to the labels, in fp64."""
    reflect_rl.use_adapter(players.model, adapter)
    logits = logits_of(players.model, reflect_rl.encode(players.tokenizer, prompt))[-1].double()
    return logits[list(menu)].log_softmax(-1)


def some_prompts(players):
    """Prompts of different lengths and with different numbers of actions, and their label ids."""
    menus = [MENU[:n] for n in (6, 2, 1, 5, 6, 3)]
    reflections = ["short.", None, "The taxi is at row 10 column 10. " * 3, "", "x" * 40, None]
    prompts = [players.prompt(*row) for row in zip(taxi_states(6), reflections, menus, strict=True)]
    return prompts, [players.label_ids(menu) for menu in menus]


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_scores_equal_the_full_models(kind, players):
    """Catches left padding without positions or mask, a wrong last position, wrong rows of the head, invalid actions
    left in the softmax: a padded batch against the whole model on each prompt alone."""
    players.labels = reflect_rl.Labels(players.tokenizer, kind)
    prompts, menus = some_prompts(players)
    lengths = {len(reflect_rl.encode(players.tokenizer, prompt)) for prompt in prompts}
    assert len(lengths) > 3, "the batch needs padding for this test to mean anything"
    with torch.no_grad():
        got = players.log_probs(prompts, menus)
    assert got.dtype == torch.float32 and got.shape == (6, 6)
    for row, prompt, menu in zip(got.double(), prompts, menus, strict=True):
        expected = full_model_log_probs(players, prompt, menu)
        torch.testing.assert_close(row[: len(menu)], expected, atol=1e-5, rtol=0)
        assert torch.all(row[len(menu) :] == -torch.inf) and row.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_scores_do_not_depend_on_batch_mates(players):
    """Catches any leak between rows: alone, reversed, and each prompt twice."""
    prompts, menus = some_prompts(players)
    with torch.no_grad():
        together = players.log_probs(prompts, menus)
        reversed_ = players.log_probs(prompts[::-1], menus[::-1]).flip(0)
        twice = players.log_probs(prompts * 2, menus * 2)
        alone = [players.log_probs([p], [menu])[0] for p, menu in zip(prompts, menus, strict=True)]
    torch.testing.assert_close(reversed_, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice[:6], together, atol=1e-5, rtol=0)
    torch.testing.assert_close(twice[6:], together, atol=1e-5, rtol=0)
    for row, single in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(single)], single, atol=1e-5, rtol=0)


def test_equal_prompts_share_a_row_but_not_a_count(bases):
    """Catches a shared forward pass that also shares the number of valid actions."""
    players = make_players(bases["llama"])
    prompt, ids = players.prompt("S", None, MENU), players.label_ids(MENU)
    with torch.no_grad():
        rows = players.log_probs([prompt, prompt], [ids, ids[:3]])
    torch.testing.assert_close(rows[1, :3].double(), full_model_log_probs(players, prompt, ids[:3]), atol=1e-5, rtol=0)
    assert torch.all(rows[1, 3:] == -torch.inf)


def test_padding_is_told_by_length_not_by_id(bases):
    """Catches a mask built from ids: here the pad id is EOS, and the text itself begins with EOS."""
    players = make_players(bases["gpt2"])
    eos = players.tokenizer.eos_token
    prompts = [f"{eos}{eos}a", "a much longer text than the other one"]
    _, mask, positions = players.left_pad(prompts)
    lengths = [len(reflect_rl.encode(players.tokenizer, p)) for p in prompts]
    assert mask.sum(1).tolist() == lengths
    assert [row[-n:].tolist() for row, n in zip(positions, lengths, strict=True)] == [list(range(n)) for n in lengths]
    with torch.no_grad():
        menu = players.label_ids(MENU[:4])
        got = players.log_probs(prompts, [menu, menu])
    torch.testing.assert_close(got[0].double(), full_model_log_probs(players, prompts[0], menu), atol=1e-5, rtol=0)


def test_scores_are_remembered_until_the_policy_changes(bases, tmp_path):
    """Catches a rollout that plays an old policy: one optimizer step, a loaded adapter, and all is scored anew."""
    players = make_players(bases["gpt2"])
    prompts, menus = some_prompts(players)
    weights = reflect_rl.adapter_parameters(players.model, "policy")
    optimizer, passes = torch.optim.AdamW(weights, lr=0.1), []
    players.features, real = lambda *args: passes.append(len(args[0])) or real(*args), players.features

    def assert_right(rows):
        with torch.no_grad():
            expected = players.log_probs(prompts, menus)
        for row, exact, menu in zip(rows, expected, menus, strict=True):
            assert row == pytest.approx(exact[: len(menu)].tolist(), abs=1e-5)
        passes.pop()
        return rows

    before = assert_right(players.scores(prompts, menus))
    assert players.scores(prompts * 2, menus * 2) == before * 2 and passes == [len(set(prompts))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert assert_right(players.scores(prompts, menus)) != before
    reflect_rl.save_adapter(players.model, "policy", tmp_path)
    for scale in (1.0, 2.0):  # other weights of the same history: only the parameters themselves are new
        tensors = {key: scale * t for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        reflect_rl.load_adapter(players.model, "policy", tmp_path)
        assert_right(players.scores(prompts, menus))


def test_dropout_is_off(bases):
    """Catches `model.train()` anywhere: the GPT-2 fixture has dropout 0.3, and rollouts must be repeatable."""
    players = make_players(bases["gpt2"])
    prompts, menus = some_prompts(players)
    first = players.log_probs(prompts, menus)
    assert torch.equal(first, players.log_probs(prompts, menus))


def test_rollout_and_update_agree(base):
    """Catches a rollout that scores otherwise than the update: the log-probs stored in play against each step alone."""
    players = make_players(base)
    tasks = envs.make("taxi").tasks("train")[:12]
    episodes = reflect_rl.play(players, lambda: envs.make("taxi"), tasks, batch=5)
    steps = [step for episode in episodes for step in episode.steps]
    assert len({step.reflection for step in steps}) > 1
    for step in steps:
        expected = full_model_log_probs(
            players, players.prompt(step.state, step.reflection, step.actions), players.label_ids(step.actions)
        )
        assert step.log_prob == pytest.approx(expected[step.action].item(), abs=1e-5)
    with torch.no_grad():
        prompts = [players.prompt(s.state, s.reflection, s.actions) for s in steps]
        again = players.log_probs(prompts, [players.label_ids(s.actions) for s in steps])
    for row, step in zip(again, steps, strict=True):
        assert row[step.action].item() == pytest.approx(step.log_prob, abs=1e-5)


def test_long_prompt_is_an_error_not_a_cut(bases):
    """Catches left truncation, which cuts the question off."""
    players = make_players(bases["llama"])
    with pytest.raises(UserError, match="512"):
        players.log_probs([players.prompt("word " * 600, None, MENU)], [players.label_ids(MENU)])
    with pytest.raises(UserError, match="512"):
        players.reflect(["word " * 600])


def test_gradient_reaches_the_policy_only(players):
    """Catches a reflector or base that learns with the policy."""
    for parameter in players.model.parameters():
        parameter.requires_grad_(True)  # even so: the reflector is not active when the policy is scored
    prompts, menus = some_prompts(players)
    players.log_probs(prompts, menus)[:, 0].sum().backward()
    for layer in reflect_rl.lora_layers(players.model).values():
        assert layer.lora_A["reflect"].grad is None and layer.lora_B["reflect"].grad is None
    assert any(p.grad.abs().sum() > 0 for p in reflect_rl.adapter_parameters(players.model, "policy"))


# ---------------------------------------------------------------------------------------------------------
# Reflections


def hf_greedy(players, prompt, limit):
    """What Hugging Face's own `generate` writes behind one prompt: the new ids up to EOS, and whether it was cut."""
    reflect_rl.use_adapter(players.model, "reflect")
    ids = reflect_rl.encode(players.tokenizer, prompt)
    eos = players.tokenizer.eos_token_id
    out = players.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos,
    )[0, len(ids) :].tolist()
    return (out[: out.index(eos)], False) if eos in out else (out, True)


def choose_eos(players, prompts):
    """Make a token EOS that the random model writes early for some prompts only, so that rows stop at different
    times."""
    reflect_rl.use_adapter(players.model, "reflect")
    written = [hf_greedy(players, prompt, 12)[0] for prompt in prompts]
    for token in sorted({t for tokens in written for t in tokens[1:]}):
        stops = sum(token in tokens for tokens in written)
        if 0 < stops < len(written):
            players.tokenizer.eos_token = players.tokenizer.convert_ids_to_tokens(token)
            return
    raise AssertionError("no token tells the prompts apart: the fixture is of no use")


def test_generate_equals_hugging_face(players, monkeypatch):
    """Catches wrong positions or a wrong cache behind left padding, rows mixed up when one leaves the batch, EOS not
    honoured, padding decoded into the text: a ragged batch against `model.generate` on each prompt alone."""
    monkeypatch.setattr(Players, "close", staticmethod(lambda text, cut: (text, cut)))
    prompts = [reflect_rl.reflector_prompt(state) for state in taxi_states(8)]
    choose_eos(players, prompts)
    expected = [hf_greedy(players, prompt, 12) for prompt in prompts]
    assert {cut for _, cut in expected} == {True, False}, "some rows must stop and some be cut"
    got = players.generate(prompts)
    assert got == [(players.tokenizer.decode(ids), cut) for ids, cut in expected]
    assert players.counts["cuts"] == sum(cut for _, cut in expected), "cut reflections must be counted"


def test_reflections_do_not_depend_on_batch_mates(players):
    """Catches padding that leaks into a reflection: then the policy's prompt would change with the batch."""
    states = taxi_states(8)
    together = players.reflect(states)
    players.clear_memo()
    assert [players.reflect([state])[0] for state in states] == together


@pytest.mark.parametrize(
    "text, cut, closed",
    [
        ("Two words.", False, "Two words."),
        (" One\nline \n only. ", False, "One line only."),
        ("Whole. Hal", True, "Whole."),
        ("One. Two. Thr", True, "One. Two."),
        ("no full stop", True, "no full stop"),
        ("", True, ""),
    ],
)
def test_cut_reflection_is_closed(text, cut, closed):
    """Catches half a sentence in the prompt: SFT never showed the policy one (it shifted the layout and cost all
    pickups)."""
    assert Players.close(text, cut) == closed


def count_forwards(model):
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    return passes


def test_greedy_reflections_are_memoised(bases):
    """Catches a cache that is not used, and equal states of a batch that are each decoded."""
    players = make_players(bases["gpt2"])
    passes = count_forwards(players.model)
    a, b = taxi_states(2)
    first = players.reflect([a, b, a])
    assert passes and first[0] == first[2] and players.counts["misses"] == 2 and players.counts["hits"] == 1
    passes.clear()
    assert players.reflect([b, a]) == [first[1], first[0]]
    assert not passes, "a known reflection was decoded again"
    players.clear_memo()
    assert players.reflect([a]) == first[:1] and passes


def test_sampled_reflections_are_not_memoised(bases):
    """Catches a cache that turns sampling into a constant."""
    players = make_players(bases["gpt2"], reflect_temperature=1.0)
    passes = count_forwards(players.model)
    state = taxi_states(1)
    written = {players.reflect(state)[0] for _ in range(4)}
    assert not players.memo and len(passes) >= 4
    assert len(written) > 1, "four samples of 12 nearly uniform tokens were all equal"


def test_memo_is_bounded(bases):
    """Catches memory that grows with every new state, and an answer lost because it was evicted at once."""
    players, free = make_players(bases["gpt2"], memo_size=3), make_players(bases["gpt2"])
    states = taxi_states(6)
    assert players.reflect(states) == free.reflect(states)
    assert list(players.memo) == states[-3:]
    assert players.reflect(states[::-1]) == free.reflect(states[::-1]) and len(players.memo) == 3


@pytest.mark.parametrize("temperature, share", [(1.0, 0.75), (0.5, 0.9), (2.0, math.sqrt(3) / (1 + math.sqrt(3)))])
def test_sampling_follows_the_temperature(temperature, share, bases):
    """Catches a temperature that multiplies, or is ignored: logits 0 and ln 3."""
    players = make_players(bases["gpt2"], reflect_temperature=temperature)
    n = 4000
    ones = players.pick(torch.tensor([0.0, math.log(3)]).repeat(n, 1)).sum().item() / n
    assert abs(ones - share) < 5 * math.sqrt(share * (1 - share) / n), (
        "five standard errors off: one in two million by chance"
    )


def test_greedy_pick_is_the_argmax(bases):
    players = make_players(bases["gpt2"])
    assert players.pick(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------------
# Play


class Countdown:
    """Task n lasts n steps; rewards show the env's own seed; ends alternate between success, failure, truncation."""

    def reset(self, *, seed=None, options=None):
        self.n, self.rng = options["task"], random.Random(seed)
        self.left = self.n
        return f"{self.left} of {self.n}", {"actions": ("a", "b"), "success": False}

    def step(self, action):
        self.left -= 1
        over, kind = self.left == 0, self.n % 3
        return (
            f"{self.left} of {self.n}",
            self.rng.random(),
            over and kind != 2,
            over and kind == 2,
            {"actions": ("a", "b"), "success": over and kind == 0},
        )


def coin(states, actions, envs):
    return [f"on {state}" for state in states], [[math.log(0.3), math.log(0.7)] for _ in states]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_play_does_not_depend_on_the_batch(batch):
    """Catches an RNG shared between episodes, and results in order of completion: lengths differ, tasks repeat."""
    tasks = [5, 1, 3, 3, 8, 2, 1, 7, 4, 6]
    episodes = reflect_rl.play(coin, Countdown, tasks, seed=3, batch=batch)
    assert [e.task for e in episodes] == tasks and [len(e.steps) for e in episodes] == tasks
    assert episodes == [reflect_rl.play(coin, Countdown, [t], seed=3, numbers=[i])[0] for i, t in enumerate(tasks)]
    assert episodes[2] != episodes[3], "two episodes of one task must differ"


def test_numbers_of_numpy_become_plain():
    """Catches an environment whose rewards and flags neither JSON nor a checkpoint can take."""

    class Numpy(Countdown):
        def step(self, action):
            state, reward, terminated, truncated, info = super().step(action)
            return state, np.float32(reward), np.bool_(terminated), np.bool_(truncated), info

    steps = [step for episode in reflect_rl.play(coin, Numpy, [2, 3]) for step in episode.steps]
    assert {type(value) for s in steps for value in (s.reward, s.terminated, s.truncated)} == {float, bool}


def test_an_environment_that_ends_is_replaced():
    """Catches a batch that runs dry while tasks wait."""
    widths = []

    def watched(states, actions, envs):
        widths.append(len(states))
        return coin(states, actions, envs)

    tasks = [1, 9, 2, 2, 1, 3, 1, 1, 4]
    reflect_rl.play(watched, Countdown, tasks, batch=3)
    full = [w == 3 for w in widths]
    assert full.count(True) >= 6 and full == sorted(full, reverse=True), f"batch sizes {widths}"
    assert sum(widths) == sum(tasks), "as many decisions as steps"


def test_steps_carry_what_happened():
    """Catches swapped flags, success inferred from reward, the state after in place of the state before."""
    episodes = reflect_rl.play(coin, Countdown, [3, 1, 2])
    ends = [(e.steps[-1].terminated, e.steps[-1].truncated, e.success) for e in episodes]
    assert ends == [(True, False, True), (True, False, False), (False, True, False)]
    steps = episodes[0].steps
    assert [s.state for s in steps] == ["3 of 3", "2 of 3", "1 of 3"] and episodes[0].final_state == "0 of 3"
    assert all(not s.terminated and not s.truncated and not s.success for s in steps[:-1])
    assert all(s.reflection == f"on {s.state}" and s.actions == ("a", "b") for s in steps)
    assert all(s.log_prob == [math.log(0.3), math.log(0.7)][s.action] for s in steps)
    assert episodes[0].total == pytest.approx(sum(s.reward for s in steps))
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].reward = 1.0


def test_actions_are_sampled_as_their_probabilities():
    """Catches sampling at another temperature, greedy play by default, a masked action taken."""
    n, rng = 4000, random.Random(0)
    rows = [math.log(0.2), -math.inf, math.log(0.8)]
    taken = [reflect_rl.choose(rows, rng, greedy=False) for _ in range(n)]
    assert 1 not in taken
    assert abs(taken.count(0) / n - 0.2) < 5 * math.sqrt(0.16 / n), (
        "five standard errors off: one in two million by chance"
    )
    assert {reflect_rl.choose(rows, rng, greedy=True) for _ in range(9)} == {2}


# ---------------------------------------------------------------------------------------------------------
# Runs on disk


def write_step(n):
    def write(folder):
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_text(str(n) * 1000)
        (folder / "state.pt").write_text(str(n))

    return write


def intact(run):
    """The complete checkpoints, each with the content that it was given."""
    found = {int(path.name[5:]): (path / "state.pt").read_text() for path in reflect_rl.checkpoints(run)}
    newest = reflect_rl.checkpoints(run)[-1]
    assert (newest / "policy" / "weights").read_text() == newest.joinpath("state.pt").read_text() * 1000, (
        "half a checkpoint"
    )
    return found


def test_two_checkpoints_are_kept(tmp_path):
    for n in range(1, 5):
        reflect_rl.save_checkpoint(tmp_path, n, write_step(n))
    assert intact(tmp_path) == {3: "3", 4: "4"}


def test_failed_save_leaves_the_older_ones(tmp_path):
    """Catches a full disk that costs the run."""
    reflect_rl.save_checkpoint(tmp_path, 1, write_step(1))

    def full_disk(folder):
        write_step(2)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        reflect_rl.save_checkpoint(tmp_path, 2, full_disk)
    assert intact(tmp_path) == {1: "1"}
    reflect_rl.save_checkpoint(tmp_path, 2, write_step(2))
    assert intact(tmp_path) == {1: "1", 2: "2"}


@pytest.mark.parametrize("call", range(16))
def test_kill_at_any_point_of_a_save_leaves_a_whole_newest_checkpoint(call, tmp_path, monkeypatch):
    """Catches any order of writes in which a kill leaves no checkpoint, or half a one that counts: the process dies at
    the n-th file operation of the third save."""
    for n in (1, 2):
        reflect_rl.save_checkpoint(tmp_path, n, write_step(n))
    calls = []

    def dying(real):
        def operation(*args, **options):
            calls.append(real)
            if len(calls) > call:
                raise Killed
            return real(*args, **options)

        return operation

    with monkeypatch.context() as patch, pytest.raises((Killed, StopIteration)):
        for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        reflect_rl.save_checkpoint(tmp_path, 3, write_step(3))
        raise StopIteration  # it took fewer operations than `call`
    assert max(intact(tmp_path)) in (2, 3)
    reflect_rl.save_checkpoint(tmp_path, 3, write_step(3))
    assert max(intact(tmp_path)) == 3, "the remains of the kill are in the way of the next save"


def test_sigkill_in_the_middle_of_a_save(tmp_path):
    """The same with a real SIGKILL, in the middle of writing the weights."""
    code = f"""
import os, signal, pathlib, reflect_rl
from test_reflect_rl import write_step
run = pathlib.Path({str(tmp_path)!r})
reflect_rl.save_checkpoint(run, 1, write_step(1))
def killed(folder):
    write_step(2)(folder)
    os.kill(os.getpid(), signal.SIGKILL)
reflect_rl.save_checkpoint(run, 2, killed)
"""
    subprocess_of("-c", code, code=-9)
    assert intact(tmp_path) == {1: "1"}
    reflect_rl.save_checkpoint(tmp_path, 2, write_step(2))
    assert intact(tmp_path) == {1: "1", 2: "2"}


def test_killed_write_leaves_the_old_text(tmp_path, monkeypatch):
    """Catches `open(path, "w")` on the file itself."""
    path = tmp_path / "config.json"
    reflect_rl.write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(Killed))
        reflect_rl.write_atomically(path, "new")
    assert path.read_text() == "old"
    reflect_rl.write_atomically(path, "new")
    assert path.read_text() == "new"


def test_existing_run_is_never_overwritten(tmp_path):
    """Catches a second start that wipes the first run, and a resume under other settings."""
    run = tmp_path / "run"
    assert reflect_rl.open_run(run, {"lr": 1, "path": Path("x").name}) is None
    reflect_rl.save_checkpoint(run, 5, write_step(5))
    with pytest.raises(UserError, match="--resume"):
        reflect_rl.open_run(run, {"lr": 1, "path": "x"})
    with pytest.raises(UserError, match="lr 1, now 2"):
        reflect_rl.open_run(run, {"lr": 2, "path": "x"}, resume=True)
    assert reflect_rl.open_run(run, {"lr": 1, "path": "x"}, resume=True) == run / "step-000005"


def test_resume_cuts_the_log_back(tmp_path):
    """Catches lines that appear twice after a resume, and half a line left by a kill."""
    run = tmp_path / "run"
    reflect_rl.open_run(run, {})
    for step in range(1, 8):
        reflect_rl.log_line(run, step=step, loss=0.5)
    reflect_rl.save_checkpoint(run, 4, write_step(4))
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    reflect_rl.open_run(run, {}, resume=True)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_resume_without_checkpoint_starts_anew(tmp_path):
    """Catches log lines of a start that was killed before its first checkpoint."""
    run = tmp_path / "run"
    reflect_rl.open_run(run, {})
    reflect_rl.log_line(run, step=1)
    assert reflect_rl.open_run(run, {}, resume=True) is None
    assert (run / "log.jsonl").read_text() == ""


def test_one_process_a_run(tmp_path):
    """Catches two processes that write one run; the lock goes with its holder."""
    with reflect_rl.lock_run(tmp_path):
        code = f"""
import envs, reflect_rl
try:
    with reflect_rl.lock_run({str(tmp_path)!r}):
        print("two at once")
except envs.UserError as error:
    print(error)
"""
        assert "another process" in subprocess_of("-c", code)[0]
    with reflect_rl.lock_run(tmp_path):
        pass


@pytest.mark.parametrize(
    "text, pair", [("mode=pickup", ("mode", "pickup")), ("n=3", ("n", 3)), ("x=", ("x", "")), ("a=b=c", ("a", "b=c"))]
)
def test_env_options(text, pair):
    assert reflect_rl.parse_option(text) == pair
