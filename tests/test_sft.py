"""The supervised loss against Hugging Face's own, masks, the loop, resume, and an overfit of ten examples."""

import argparse
import functools
import math
import re
import threading
import time

import pytest
import torch
from conftest import Killed, randomise, read_log, run_script, tiny_options
from corridor import Corridor
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import envs
import negatives
import reflect_rl
import sft
from envs import UserError

PAIRS = [([5, 6, 7], [8, 9]), ([5, 0, 7, 8, 9, 10], [11, 0]), ([5], [6, 7, 8, 0]), ([20, 21], [0])]


# ---------------------------------------------------------------------------------------------------------
# Loss and masks


def test_collate_masks_by_length():
    """Catches masks built from ids: token 0 is padding, EOS, and here part of prompts and completions too."""
    ids, mask = sft.collate(PAIRS)
    assert ids.tolist() == [
        [5, 6, 7, 8, 9, 0, 0, 0],
        [5, 0, 7, 8, 9, 10, 11, 0],
        [5, 6, 7, 8, 0, 0, 0, 0],
        [20, 21, 0, 0, 0, 0, 0, 0],
    ]
    assert mask.int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]


def test_completion_loss_equals_hugging_faces(base):
    """Catches an off-by-one shift, padding in the mean, prompt tokens in the loss; right padding without a mask must do
    no harm: HF gets one with it."""
    model, _ = reflect_rl.load_base(base)
    ids, mask = sft.collate(PAIRS)
    real = torch.tensor([[i < len(p) + len(c) for i in range(ids.shape[1])] for p, c in PAIRS])
    with torch.no_grad():
        expected = model(ids, attention_mask=real.long(), labels=ids.masked_fill(~mask, -100)).loss
        assert sft.completion_loss(model, ids, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_without_completion_is_an_error(bases):
    """Catches the silent NaN of a batch that is wholly masked (a marker that is not in the text)."""
    model, _ = reflect_rl.load_base(bases["gpt2"])
    ids, mask = sft.collate([([5, 6, 7], [])])
    with pytest.raises(ValueError, match="completion"):
        sft.completion_loss(model, ids, mask)


def test_eos_is_trained_even_if_it_pads(tokenizer):
    """Catches stopping that is never learned: the last target of every reflection is EOS, which here is the pad
    token."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    records = negatives.make_records(Corridor, 4, 0.5, seed=0)
    pairs = sft.tokenized(tokenizer, negatives.sft_examples(records, "reflect", []), "reflect")
    ids, mask = sft.collate(pairs)
    for row, targets, record in zip(ids, mask, records, strict=True):
        assert row[targets][-1] == tokenizer.eos_token_id, "EOS is not among the trained targets"
        assert tokenizer.decode(row[targets][:-1]).strip() == record.reflection


def test_gradient_pulls_eos_up(bases):
    """The same by its effect: one step on a completion that is EOS alone makes EOS more probable, and nothing else
    is in it."""
    model, tokenizer = reflect_rl.load_base(bases["gpt2"])
    ids, mask = sft.collate([([5, 6, 7], [tokenizer.eos_token_id]), ([5, 6, 7, 8, 9], [tokenizer.eos_token_id])])
    before = sft.completion_loss(model, ids, mask)
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-2 * p.grad
        assert sft.completion_loss(model, ids, mask) < before


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_training_ids_are_what_play_feeds(kind, tokenizer):
    """Catches a prompt tokenized otherwise in training than in play, and labels whose trained token is not the
    scored one."""
    records = negatives.make_records(Corridor, 3, 0.0, seed=0)
    labels = reflect_rl.Labels(tokenizer, kind)
    for form in ("policy", "plain", "reflect"):
        examples = negatives.sft_examples(records, form, labels)
        for (prompt, completion), (prompt_ids, completion_ids), record in zip(
            examples, sft.tokenized(tokenizer, examples, form), records, strict=True
        ):
            assert prompt_ids == reflect_rl.encode(tokenizer, prompt)
            if form == "reflect":
                assert reflect_rl.encode(tokenizer, prompt + completion) == prompt_ids + completion_ids[:-1]
            else:
                assert completion_ids == [labels(record.actions)[1][record.action]]


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_micro_batches_give_the_whole_batchs_gradient(micro_batch, bases):
    """Catches a mean of means: completions have different lengths, so micro-batches have different weights."""
    model, _ = reflect_rl.load_base(bases["llama"])
    expected = sft.completion_loss(model, *sft.collate(PAIRS))
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert sft.accumulate(model, PAIRS, micro_batch, bf16=False) == pytest.approx(expected.item(), rel=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# The loop


def test_learning_rate_warms_up_and_falls():
    """Catches a schedule in epochs, a restart, a rate that ends at 0 long before the end."""
    schedule = sft.Schedule(steps=100, batch=1, lr=1.0, warmup=10)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and 0.1 <= rates[-1] < 0.11
    assert all(rate > 0 for rate in map(sft.Schedule(steps=3, batch=1, lr=1.0).lr_at, range(3)))


@pytest.mark.parametrize("n, size", [(10, 4), (7, 7), (3, 8), (5, 1)])
def test_batches_are_permutations_and_functions_of_the_step(n, size):
    """Catches sampling with replacement, a last batch dropped, and an order that depends on what was asked before."""
    batch_at = sft.shuffled_batches(list(range(n)), size, seed=0)
    drawn = [x for step in range(3 * n) for x in batch_at(step)]
    epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has the same order"
    assert sft.shuffled_batches(list(range(n)), size, seed=0)(n + 1) == batch_at(n + 1)


def ten_examples():
    """Ten states of Corridor, half of them after a mistake."""
    records = {record.state: record for record in negatives.make_records(Corridor, 40, 0.5, seed=0)}
    return sorted(records.values(), key=lambda record: record.mistake)[-10:]


@pytest.mark.parametrize("stage", ["reflect", "policy", "plain"])
def test_ten_examples_are_learned_by_heart(stage, bases, tmp_path):
    """Catches masks, shifts, prompts and stopping that are wrong together: LoRA on a random base gets the loss near 0,
    and *generation* gives back every text, stopped by EOS."""
    model, tokenizer = reflect_rl.load_base(bases["llama"])
    model.get_output_embeddings().weight.data *= 4  # frozen, as the last norm is: it bounds how sure the model can be
    name = "reflect" if stage == "reflect" else "policy"
    torch.manual_seed(0)
    reflect_rl.add_adapter(model, name, 16, 16)
    reflect_rl.use_adapter(model, name)
    players, records = reflect_rl.Players(model, tokenizer, max_reflection=40), ten_examples()
    assert any(record.mistake for record in records)
    pairs = sft.tokenized(tokenizer, negatives.sft_examples(records, stage, players.labels), stage)
    schedule = sft.Schedule(steps=120, batch=10, lr=2e-2, warmup=5)
    sft.fit(
        model,
        reflect_rl.adapter_parameters(model, name),
        lambda step: pairs,
        schedule,
        tmp_path,
        write=lambda folder: None,
    )
    found = sft.held_out(players, records, stage)
    assert found["valid_loss"] < 0.05 and found["valid_exact"] == 1.0, found
    assert players.counts["cuts"] == 0, "a learned reflection ran to the limit"


def test_held_out_loss_is_exact_and_leaves_the_adapter_on(bases):
    """Catches a held-out loss of another adapter, and a report after which training goes on with the wrong one."""
    model, tokenizer = reflect_rl.load_base(bases["gpt2"])
    for name in ("reflect", "policy"):
        reflect_rl.add_adapter(model, name, 4, 8)
    randomise(model, "reflect", "policy")
    players, records = reflect_rl.Players(model, tokenizer, max_reflection=8), ten_examples()
    for stage, name in (("reflect", "reflect"), ("policy", "policy"), ("plain", "policy")):
        found = sft.held_out(players, records, stage)
        assert {layer.active for layer in reflect_rl.lora_layers(model).values()} == {name}
        pairs = sft.tokenized(tokenizer, negatives.sft_examples(records, stage, players.labels), stage)
        with torch.no_grad():
            losses = [
                -model(torch.tensor([[*p, *c]])).logits[0].log_softmax(-1)[range(len(p) - 1, len(p) + len(c) - 1), c]
                for p, c in pairs
            ]
        assert found["valid_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert 0 <= found["valid_exact"] <= 1


# ---------------------------------------------------------------------------------------------------------
# Runs


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_adapters(one, other):
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saving_often(monkeypatch):
    monkeypatch.setattr(sft, "fit", functools.partial(sft.fit, save_every=3))


def sft_options(bases, runs):
    return [*tiny_options(bases["gpt2"], runs), "--reflect-steps", 8, "--policy-steps", 8]


def test_same_seed_same_run_and_resume_equals_uninterrupted(bases, tmp_path, monkeypatch):
    """Catches a data order, a LoRA initialisation or optimizer state that a resume forgets: killed after the checkpoint
    of step 6 and gone on with, the adapters and logs are those of a run in one go; so are those of a second run."""
    saving_often(monkeypatch)
    run_script(sft, *sft_options(bases, tmp_path / "a"), monkeypatch=monkeypatch)
    run_script(sft, *sft_options(bases, tmp_path / "b"), monkeypatch=monkeypatch)
    real, seen = sft.accumulate, []

    def dying(*args):
        seen.append(args)
        if len(seen) == 8:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sft, "accumulate", dying)
        run_script(sft, *sft_options(bases, tmp_path / "c"), monkeypatch=patch)
    stage = tmp_path / "c" / "corridor-sft-s0" / "reflect"
    assert reflect_rl.checkpoints(stage)[-1].name == "step-000006"
    torch.manual_seed(99)
    run_script(sft, *sft_options(bases, tmp_path / "c"), monkeypatch=monkeypatch)
    for name in ("reflect", "policy"):
        folders = [tmp_path / run / "corridor-sft-s0" / name for run in "abc"]
        assert_equal_adapters(folders[0], folders[1])
        assert_equal_adapters(folders[0], folders[2])
        assert read_log(folders[0]) == read_log(folders[1]) == read_log(folders[2])


def test_finished_stage_is_left_alone(runs, bases, capsys, monkeypatch):
    """Catches an SFT that trains again, or otherwise, what RL already rests on."""
    folder = runs / "corridor-sft-s0"
    before = {path: path.read_bytes() for path in folder.rglob("adapter*")}
    run_script(sft, *tiny_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    assert len(before) == 6 + sum("step-" in str(p) for p in before)
    assert {path: path.read_bytes() for path in folder.rglob("adapter*")} == before
    assert "done already" in capsys.readouterr().out


def test_sft_run_with_other_settings_is_refused(runs, bases, monkeypatch):
    """Catches a second SFT with other options that silently uses the first one's adapters."""
    with pytest.raises(UserError, match="trajectories 10, now 11"):
        run_script(sft, *tiny_options(bases["gpt2"], runs), "--trajectories", 11, monkeypatch=monkeypatch)


def test_no_negatives_is_a_run_of_its_own(bases, tmp_path, monkeypatch):
    """Catches an ablation that trains on the other run's data."""
    run_script(
        sft, *tiny_options(bases["gpt2"], tmp_path), "--no-negatives", "--stage", "plain", monkeypatch=monkeypatch
    )
    [run] = tmp_path.iterdir()
    records = negatives.read_records(run / "data" / "train.jsonl")
    assert "no-negatives" in run.name and not any(record.negative or record.mistake for record in records)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer and base LM


def test_tokenizer_keeps_grid_cells_apart():
    """Catches a map whose cells merge with their neighbours: every digit and punctuation mark is a token of its own."""
    state = envs.make("taxi").reset(options={"task": 3})[0]
    tokenizer = sft.train_tokenizer([state] * 50 + ["row 10 column 100"] * 50, 400)
    joined = tokenizer.tokenize("|" + sft.JOINED)[0].removeprefix("|")
    for text in (state, "row 10 column 100", "12:34|56"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not [
            token
            for token in tokenizer.convert_ids_to_tokens(ids)
            if len(token.removeprefix("Ġ").removesuffix(joined)) > 1 and any(c.isdigit() or c in "|:+-" for c in token)
        ]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("ünïcode → ok")["input_ids"]) == "ünïcode → ok"


def test_facts_are_tokenized_behind_their_prompt(tokenizer):
    """Catches an exam whose right answers cannot be given: the fact's rest must be what follows in the whole text."""
    state = envs.make("taxi").reset(options={"task": 3})[0]
    prompt, rest = f"{state}\n{negatives.FACTS_HEADER}The taxi is at row", " 2 column 3."
    assert reflect_rl.encode(tokenizer, prompt) + sft.encode_more(tokenizer, prompt, rest) == reflect_rl.encode(
        tokenizer, prompt + rest
    )


def test_base_is_made_from_nothing(tmp_path, monkeypatch, capsys):
    """`--stage base` in small: a loadable LM with a finite held-out loss, and never over an existing one."""
    corpus = sft.base_corpus
    monkeypatch.setattr(sft, "base_corpus", lambda names, seed, numbers: corpus(names, seed, list(numbers)[:40]))
    monkeypatch.setattr(sft, "reading_accuracy", functools.partial(sft.reading_accuracy, states=3))
    options = [
        "--stage",
        "base",
        "--out",
        tmp_path / "new",
        "--runs",
        tmp_path / "runs",
        "--device",
        "cpu",
        "--bf16",
        "off",
        "--width",
        32,
        "--layers",
        1,
        "--base-steps",
        5,
        "--base-batch",
        4,
        "--copy-steps",
        1,
    ]
    run_script(sft, *options, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    model, tokenizer = reflect_rl.load_base(tmp_path / "new")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.vocab_size
        == len(tokenizer)
        == model.get_output_embeddings().weight.shape[0]
    )
    loss = float(out.split("held-out loss ")[1].split()[0])
    assert 0 < loss < math.log(len(tokenizer)) + 1
    assert "The taxi is at row" in out, "what the LM can read is not reported"
    with pytest.raises(UserError, match="another --out"):
        run_script(sft, *options, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="multiple of 32"):
        run_script(sft, *options, "--out", tmp_path / "odd", "--width", 48, monkeypatch=monkeypatch)


def test_numbered_things_are_one_token_and_numbers_are_not():
    """Catches `cabinet 3` cut in two, and digits that merge with any other word or with a third digit."""
    text = "go to cabinet 3, then cabinet 12. row 3 of cabinet 123"
    tokens = sft.train_tokenizer([text] * 50, 400, ("cabinet",)).tokenize(text)
    assert [token.removeprefix("Ġ") for token in tokens if "cabinet" in token] == ["cabinetĠ3", "cabinetĠ12", "cabinet"]
    assert "Ġrow" in tokens and tokens[-3:] == ["Ġ1", "2", "3"]


def test_a_word_has_the_same_tokens_wherever_it_stands():
    """Catches a word that cannot be found by comparing tokens, and text that does not come back as it was."""
    texts = [
        "about overview\nDirectory: /overview/x",
        'an overview: {"overview": 3}',
        "def my_overview(overview=1):\n    x = 2",
    ]
    tokenizer = sft.train_tokenizer(texts * 50, 340)
    starts = ("an ", "/", "\n", '"', "my_", "3", "(")
    [word] = {tokenizer(f"{start}overview")["input_ids"][-1] for start in starts}
    assert all(tokenizer(text)["input_ids"].count(word) == text.count("overview") for text in texts)
    for text in [*texts, "a/b c.d\n  e\n\nf(g)h 3rd it's | : x"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_reading_accuracy_is_measured(tokenizers, monkeypatch):
    """Catches an exam that everybody passes, or nobody: a model that knows one fixed text by heart gets exactly it
    right."""
    tokenizer = tokenizers["digit-splitting"]

    class Knows(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, use_cache=False):  # predicts the true next token wherever the fact is on the passenger
            logits = torch.zeros(*ids.shape, len(tokenizer))
            for row, text in enumerate(tokenizer.batch_decode(ids)):
                if re.search(r"(on board|waiting)\.", text):
                    logits[row, range(ids.shape[1] - 1), ids[row, 1:]] = 1.0
            return type("Output", (), {"logits": logits})

    shares = sft.reading_accuracy(Knows(), tokenizer, "taxi", states=4)
    [known] = [beginning for beginning in shares if re.fullmatch(r"The passenger is( now)?", beginning)]
    assert shares.pop(known) == (4, 4)
    assert shares and not any(right for right, _ in shares.values())


def test_labels_are_examined(tokenizers):
    """Catches an exam of another position: a model that always says B behind the header is right on one of two
    documents; one that names no action, or a verb that several begin with, is not asked about."""
    tokenizer = tokenizers["digit-splitting"]
    b = tokenizer("\nB")["input_ids"][-1]

    class SaysB(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, use_cache=False):
            logits = torch.zeros(*ids.shape, len(tokenizer))
            logits[..., b] = 1.0
            return type("Output", (), {"logits": logits})

    documents = [f"A is\n{fact}\n# Actions:\nA go x\nB go y\n# Action:\n{label}\nz" for fact, label in
                 (("Now: go x.", "A"), ("Now: go y.", "B"), ("Then.", "B"), ("Now: go.", "B"))]  # fmt: skip
    assert sft.label_accuracy(SaysB(), tokenizer, documents) == (1, 2)


def test_copying_comes_first(tokenizers):
    """Catches documents before copying is known, no copying among them, batches that a resumed run sees anew, and a
    loss on the state, which is random."""
    options = argparse.Namespace(seed=0, base_batch=4, copy_steps=2)
    corpus = sft.BaseCorpus(["taxi", "autoexplore"], options, tokenizers["digit-splitting"])
    copies = [[prompt == completion for prompt, completion in corpus.batch_at(step)] for step in range(4)]
    assert copies == [[True] * 16] * 2 + [[True] * 2 + [False] * 4] * 2
    for prompt, completion in corpus.batch_at(3)[2:]:
        state, rest = map(corpus.tokenizer.decode, (prompt, completion[:-1]))
        assert state.endswith("\n# Facts:\n") and (state + rest).count("# Action:\n") == 1
        assert completion[-1] == corpus.tokenizer.eos_token_id
    assert corpus.batch_at(3) == corpus.batch_at(3) != corpus.batch_at(2)


@pytest.mark.parametrize("width", [64, 128])
def test_first_heads_start_by_looking_back(width):
    """Catches a rotation the wrong way round, or queries and keys of other heads."""
    torch.manual_seed(0)
    model = sft.new_base(64, width, 2).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.randint(64, (2, 400)), output_attentions=True).attentions[0]  # (B, heads, T, T)

    def shares(head):  # of the attention, by how far back
        return [weights[:, head].diagonal(-back, 1, 2)[:, 300:].mean().item() for back in range(90)]

    before, window = shares(0), shares(1)
    assert before[1] > 0.8 and before[1] > 10 * max(before[0], *before[2:]), before[:5]
    assert sum(window[:4]) > 0.9 and min(window[:4]) > 0.1, window[:8]


def test_base_optimizers_hold_every_parameter_once():
    model = sft.new_base(64, 64, 2)
    held = [p for o in sft.base_optimizers(model, 0.02) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_corpus_is_a_function_of_its_numbers():
    """Catches documents that depend on the order in which they are made: a resumed base run would see others."""
    letters = {"taxi": lambda actions: (reflect_rl.LABELS, None)}
    assert sft.base_corpus(letters, 0, range(6))[3:] == sft.base_corpus(letters, 0, range(3, 6))
    assert sft.base_corpus(letters, 0, range(3)) != sft.base_corpus(letters, 1, range(3))
    both = letters | {"autoexplore": letters["taxi"]}
    asks = ["Question: " in document for document in sft.base_corpus(both, 0, range(6))]
    assert asks == [False, True, True] * 2, "AutoExplore has two turns"


def test_a_second_run_waits_for_the_first(bases, runs, capsys, monkeypatch):
    """Catches two `rl.py` started together that write one SFT run: the second goes on when the first is done."""
    began, said = threading.Event(), ""
    monkeypatch.setattr(sft, "train_stage", lambda *rest, **more: began.set())
    options = [*tiny_options(bases["gpt2"], runs), "--stage", "policy"]
    second = threading.Thread(target=lambda: run_script(sft, *options, monkeypatch=monkeypatch))
    with reflect_rl.lock_run(runs / "corridor-sft-s0"):
        second.start()
        while "waiting" not in said and second.is_alive():
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert "waiting" in said and not began.is_set()
    second.join()
    assert began.is_set()
