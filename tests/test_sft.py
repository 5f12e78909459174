"""The supervised loss against Hugging Face's own, masks, the loop, resume, and an overfit of ten examples."""

import argparse
import dataclasses
import json
import threading
import types

import pytest
import torch
from conftest import Killed, make_players, read_log, resolved, rows_of, run_script, scaled, sft_folder, tiny_options
from corridor import Corridor
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

import plumbing.runs
import negatives
import reflect_rl
import rl
import sft
from envs import UserError

PAIRS = [([5, 6, 7], [8, 9]), ([5, 0, 7, 8, 9, 10], [11, 0]), ([5], [6, 7, 8, 0]), ([20, 21], [0])]


def some_records(n=4, **options):
    return negatives.make_records(Corridor, n, 0.5, seed=0)[0]


def players_for(tokenizer, **options):
    """Players that only tokenize."""
    model = types.SimpleNamespace(device="cpu", config=PretrainedConfig(), forward=len)
    return reflect_rl.Players(model, tokenizer, **options)


# ---------------------------------------------------------------------------------------------------------
# Loss and masks


def test_collate_masks_by_length():
    """Catches masks built from ids: token 0 is padding, EOS, and here part of prompts and completions too."""
    ids, mask = sft.collate(PAIRS)
    rows = [[5, 6, 7, 8, 9, 0, 0, 0], [5, 0, 7, 8, 9, 10, 11, 0], [5, 6, 7, 8, 0, 0, 0, 0], [20, 21, 0, 0, 0, 0, 0, 0]]
    assert ids.tolist() == rows
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[3, 4], [6, 7], [1, 2, 3, 4], [2]]


def assert_hugging_faces_loss(model):
    """Of each row alone, without padding, labels -100 on the prompt; the mean is over all tokens."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for prompt, completion in PAIRS:
            labels = torch.tensor([[-100] * len(prompt) + completion])
            loss = model(torch.tensor([prompt + completion]), labels=labels).loss
            total, tokens = total + loss.item() * len(completion), tokens + len(completion)
        assert sft.completion_loss(model, *sft.collate(PAIRS)).item() == pytest.approx(total / tokens, rel=1e-5)


def test_completion_loss_equals_hugging_faces(base):
    """Catches an off-by-one shift, padding or prompt tokens in the mean, right padding that does harm, a batch without
    completions, whose loss is a silent NaN."""
    model, _ = reflect_rl.load_base(base)
    assert_hugging_faces_loss(model)
    with pytest.raises(ValueError, match="completion"):
        sft.completion_loss(model, *sft.collate([([5, 6, 7], [])]))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_loss_goes_through_the_models_own_forward(kind):
    """Catches features times the head in place of the logits: these models cap or scale theirs."""
    assert_hugging_faces_loss(scaled(kind, 100))


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_micro_batches_give_the_whole_batchs_gradient(micro_batch, bases):
    """Catches a mean of means: completions have different lengths, so micro-batches have different weights."""
    players = make_players(bases["llama"], micro_batch=micro_batch)
    reflect_rl.use_adapter(players.model, "policy")
    parameters = reflect_rl.adapter_parameters(players.model, "policy")
    expected = sft.completion_loss(players.model, *sft.collate(PAIRS))
    gradients, rows = torch.autograd.grad(expected, parameters), rows_of(players.model)
    assert sft.loss_of(PAIRS, players, backward=True) == pytest.approx(expected.item(), rel=1e-5)
    assert max(rows) == min(micro_batch, 4)
    for p, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_training_ids_are_what_play_feeds(kind, tokenizer):
    """Catches a prompt tokenized otherwise in training than in play, labels whose trained token is not the scored one,
    an EOS that is not trained because it is also the padding: then stopping is never learned."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    records, players = some_records(), players_for(tokenizer, labels=kind)
    for stage in ("policy", "plain"):
        for (ids, completion), record in zip(sft.examples_of(records, stage, players), records, strict=True):
            labels, menu = players.labels(record.actions)
            reflection = record.reflection if stage == "policy" else None
            prompt = reflect_rl.policy_prompt(record.state, reflection, record.actions, labels)
            assert ids == reflect_rl.encode(tokenizer, prompt) and completion == [menu[record.action]]
    pairs = sft.examples_of(records, "reflect", players)
    ids, mask = sft.collate(pairs)
    for row, targets, (prompt, completion), record in zip(ids, mask, pairs, records, strict=True):
        text = reflect_rl.reflector_prompt(record.state)
        assert prompt == reflect_rl.encode(tokenizer, text) and completion.pop() == tokenizer.eos_token_id
        assert reflect_rl.encode(tokenizer, text + record.reflection) == prompt + completion
        assert row[targets].tolist() == [*completion, tokenizer.eos_token_id]
        assert tokenizer.decode(completion).strip() == record.reflection


def test_a_reflection_is_trained_as_it_is_generated():
    """Catches a completion whose first token merged with the prompt's last one, which generation never sees, and a
    special token in a teacher's text that ends it early."""
    tokenizer = Tokenizer(models.BPE())  # without words: it merges across the line break
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator(["S\n# Analyze:\nThe <end> is near.", "\nThe <end>"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    assert any("\nT" in token for token in tokenizer.get_vocab()), "this tokenizer does not merge"
    record = negatives.Record(0, False, False, "S", "The <end> is near.", ("a",), 0)
    [(prompt, completion)] = sft.examples_of([record], "reflect", players_for(tokenizer))
    assert prompt == reflect_rl.encode(tokenizer, "S\n# Analyze:\n")
    assert completion.index(tokenizer.eos_token_id) == len(completion) - 1
    assert tokenizer.decode(completion[:-1]).replace(" ", "") == "The<end>isnear."


def test_a_reflection_has_one_form(tmp_path, tokenizers):
    """Catches line breaks and double spaces of a teacher that train otherwise than they play, in one's own file or in
    one's own environment."""

    class Poet(Corridor):
        def reflection(self, mistake):
            return " The goal\n is  far. \n"

    [*own] = negatives.make_records(Poet, 1, 0.0, seed=0)[0]
    lines = [json.dumps(vars(record) | {"reflection": " The goal\n is  far. \n"}) for record in own]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    players = players_for(tokenizers["GPT-2-like"])
    for records in (own, negatives.read_records(tmp_path / "own.jsonl")):
        prompt, completion = sft.examples_of(records, "reflect", players)[0]
        assert players.tokenizer.decode(completion[:-1]) == "The goal is far."
        assert "\n# Analyze:\nThe goal is far.\n# Actions:" in sft.steps_of(records, "policy", players)[0].prompt


# ---------------------------------------------------------------------------------------------------------
# The loop


def test_learning_rate_warms_up_and_falls():
    """Catches a schedule in epochs, a restart, a rate of 0, a warm-up that is longer than the run."""
    rates = [sft.lr_at(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[19] == rates[20] == max(rates) == 2.0
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(1.1) and 0.2 <= rates[-1] < 0.21
    for steps in (1, 2, 3, 5, 20):
        rates = [sft.lr_at(step, steps, 1.0) for step in range(steps)]
        assert max(rates) == 1.0 and min(rates) >= 0.1, "a short run reaches the peak"


@pytest.mark.parametrize("n, size", [(10, 4), (7, 7), (3, 8), (5, 1)])
def test_batches_are_permutations_and_functions_of_the_step(n, size):
    """Catches sampling with replacement, a last batch dropped, and an order that depends on what was asked before."""
    args = argparse.Namespace(batch=size, seed=0)
    batches = [sft.batch_at(range(n), step, args) for step in range(3 * n)]
    drawn = sum(batches, [])
    epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or len(set(map(tuple, epochs))) > 1, "every epoch has the same order"
    sft.permutation.cache_clear()
    assert sft.batch_at(range(n), n + 1, args) == batches[n + 1]


def ten_records():
    """Ten states of Corridor, half of them after a mistake."""
    records = {record.state: record for record in some_records(40)}
    return sorted(records.values(), key=lambda record: record.mistake)[-10:]


@pytest.mark.parametrize("stage", ["reflect", "policy", "plain"])
def test_ten_examples_are_learned_by_heart(stage, bases, tmp_path):
    """Catches masks, shifts, prompts and stopping that are wrong together: LoRA on a random base gets the loss near 0,
    and *generation* gives back every text, stopped by EOS."""
    model, tokenizer = reflect_rl.load_base(bases["llama"])
    model.get_output_embeddings().weight.data *= 4  # frozen, as the last norm is: it bounds how sure the model can be
    torch.manual_seed(0)
    reflect_rl.add_adapter(model, stage, 16, 16)
    players, records = reflect_rl.Players(model, tokenizer, max_reflection=40), ten_records()
    assert any(record.mistake for record in records)
    args = argparse.Namespace(lr=2e-2, batch=10, seed=0)
    pairs = sft.examples_of(records, stage, players)
    sft.fit(plumbing.runs.Run(tmp_path, args), players, stage, pairs, records, 120, args)
    figures = read_log(tmp_path)
    assert [line["step"] for line in figures if "valid_loss" in line] == [100, 120]
    assert figures[-1]["valid_loss"] < 0.05 and figures[-1]["valid_exact"] == 1.0, figures[-1]
    assert figures[0]["loss"] > 3 and players.counts["cuts"] < 10, "a learned reflection ran to the limit"


def test_held_out_figures(bases):
    """Catches a held-out loss of another adapter or another mean, and a share of right answers that is no share."""
    players, records = make_players(bases["gpt2"], max_reflection=8, micro_batch=4), ten_records()
    for stage, adapter in (("reflect", "reflect"), ("policy", "policy")):
        found = sft.held_out(players, records, stage)
        reflect_rl.use_adapter(players.model, adapter)
        losses, right = [], 0
        for (prompt, completion), record in zip(sft.examples_of(records, stage, players), records, strict=True):
            with torch.no_grad():
                logits = players.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            losses += (-logits.log_softmax(-1)[range(len(completion)), completion]).tolist()
            menu = players.labels(record.actions)[1]
            right += stage == "policy" and logits[0, list(menu)].argmax().item() == record.action
        assert found["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert found["valid_exact"] == right / 10
    states = [record.state for record in records]
    [first, *_] = players.reflect(states)
    players.reflections = dict.fromkeys(states, "written by older weights")
    known = [dataclasses.replace(records[0], reflection=first), *records[1:]]
    assert sft.held_out(players, known, "reflect")["valid_exact"] == 0.1


def test_a_gradient_that_is_not_finite_ends_in_one_line(bases, tmp_path, monkeypatch):
    """Catches NaN weights that are saved as the last good checkpoint."""
    real = sft.completion_loss
    monkeypatch.setattr(sft, "completion_loss", lambda *args: real(*args) * torch.tensor(float("nan")))
    with pytest.raises(UserError, match="update 1: the gradient is not finite"):
        run_script(sft, *tiny_options(bases["gpt2"], tmp_path), monkeypatch=monkeypatch)
    assert not (sft_folder(tmp_path) / "reflect" / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------------------------------
# Runs


def assert_equal_runs(one, other):
    """Adapters and logs of both stages are the same, bit by bit."""
    for stage in ("reflect", "policy"):
        a, b = (load_file(sft_folder(runs) / stage / "adapter_model.safetensors") for runs in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert read_log(sft_folder(one) / stage) == read_log(sft_folder(other) / stage)


def test_auto_stops_at_the_minimum_of_the_held_out_loss(bases, tmp_path, monkeypatch):
    """Catches weights of the last update instead of the best, a minimum that a resume forgets, a stop that never comes
    or comes at once: a rate far too high, so that the loss soon rises again."""
    monkeypatch.setattr(sft, "LOOK_EVERY", 2)
    monkeypatch.setattr(sft, "PATIENCE", 6)
    options = ["--stage", "policy", "--policy-steps", "auto", "--lr", 0.05, "--batch", 4]
    for runs, stops in ((tmp_path / "whole", ()), (tmp_path / "cut", (3, 5, 8))):
        for stop in stops:
            with monkeypatch.context() as patch:
                patch.setattr(sft, "batch_at", lambda *args, at=sft.batch_at, stop=stop: killed_at(stop, at, *args))
                with pytest.raises(Killed):
                    run_script(sft, *tiny_options(bases["gpt2"], runs), *options, monkeypatch=patch)
        run_script(sft, *tiny_options(bases["gpt2"], runs), *options, monkeypatch=monkeypatch)
    folder = sft_folder(tmp_path / "whole")
    losses = {line["step"]: line["valid_loss"] for line in read_log(folder / "policy") if "valid_loss" in line}
    best = min(losses, key=losses.get)
    count = len(sft.negatives.read_records(folder / "data" / "train.jsonl"))
    for run in (folder, sft_folder(tmp_path / "cut")):  # what is left of the updates after the minimum is thrown away
        assert plumbing.runs.budget_of([run / "policy"]) == {"records": count, "updates": best, "episodes": 0}
    assert 2 <= best < max(losses) == best + 6 and all(step % 2 == 0 for step in losses)
    players = reflect_rl.load_players(resolved("--base", bases["gpt2"]), {"policy": folder / "policy"})
    records = sft.negatives.read_records(folder / "data" / "valid.jsonl")
    assert sft.held_out_loss(players, records, "policy") == pytest.approx(losses[best], abs=1e-5)
    other = sft_folder(tmp_path / "cut")
    a, b = (load_file(run / "policy" / "adapter_model.safetensors") for run in (folder, other))
    assert all(torch.equal(a[key], b[key]) for key in a) and read_log(folder / "policy") == read_log(other / "policy")


def test_auto_ends_where_the_loss_has_reached_nothing(bases, tmp_path, monkeypatch):
    """Catches a stage that goes on to its last update because a loss of 0.00001 still falls."""
    monkeypatch.setattr(sft, "LOOK_EVERY", 2)
    monkeypatch.setattr(sft, "PATIENCE", 6)
    falling = iter(range(1000))
    monkeypatch.setattr(sft, "held_out_loss", lambda *args: 1e-3 / (1 + next(falling)))  # 0.001, 0.0005, 0.00033, ...
    run_script(sft, *tiny_options(bases["gpt2"], tmp_path), "--stage", "policy", "--policy-steps", "auto",
               monkeypatch=monkeypatch)
    folder = sft_folder(tmp_path)
    [updates] = {line["step"] for line in read_log(folder / "policy")[-1:]}
    assert updates == 16 and plumbing.runs.budget_of([folder / "policy"])["updates"] == 10


def killed_at(stop, batch_at, pairs, step, args):
    if step == stop:
        raise Killed
    return batch_at(pairs, step, args)


@pytest.mark.parametrize("owner, name", [(sft, "batch_at"), (plumbing.runs.Run, "log"), (plumbing.runs.Run, "save")])
def test_killed_at_any_update_and_resumed_equals_uninterrupted(owner, name, runs, bases, tmp_path, monkeypatch):
    """Catches a data order, a LoRA initialisation, an optimizer state or a log line that a resume forgets or repeats:
    each start does one update and dies in the next, until both stages are done."""
    options, real, starts, calls = tiny_options(bases["gpt2"], tmp_path / "killed"), getattr(owner, name), 0, []

    def dying(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return real(*args, **more)

    while starts < 20:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            starts, calls[:] = starts + 1, []
            torch.manual_seed(starts)
            try:
                run_script(sft, *options, monkeypatch=patch)
                break
            except Killed:
                continue
    assert 4 < starts < 20
    assert_equal_runs(tmp_path / "killed", runs)


def test_finished_stages_are_left_alone(runs, bases, capsys, monkeypatch):
    """Catches an SFT that trains again, or otherwise, what RL already rests on; another device or micro-batch is no
    other run."""
    folder = sft_folder(runs)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sum(path.name == "adapter_model.safetensors" for path in before) == 3
    run_script(sft, *tiny_options(bases["gpt2"], runs), "--micro-batch", 5, monkeypatch=monkeypatch)
    assert "done already" in capsys.readouterr().out
    policy = folder / "policy" / "adapter_config.json"
    policy.unlink()  # as if killed before its end: it alone is finished
    run_script(sft, *tiny_options(bases["gpt2"], runs), monkeypatch=monkeypatch)
    assert {path: path.read_bytes() for path in before} == before
    assert "policy   update" not in capsys.readouterr().out, "its updates were all done"


OTHER = ["--base b", "--seed 1", "--lr 1", "--batch 2", "--rank 2", "--no-negatives", "--env a:Own"]
OTHER += ["--env b:Own", "--env-option mode=pickup", "--max-reflection 9", "--labels words"]


def test_other_settings_have_another_folder(tmp_path, monkeypatch):
    """Catches SFT runs of other bases, data, environments or options that share adapters, and RL runs that do not."""
    monkeypatch.setattr(reflect_rl.envs, "env_class", lambda name: Corridor)

    def folder(options, *more):
        args = resolved("--device", "cpu", *options.split(), tables=(sft.DATA_OPTIONS, sft.OPTIONS, *more))
        if rl.OPTIONS in more:
            rl.resolve(args)
        return sft.folder_of(args)

    folders = [folder(options) for options in ["", *OTHER]]
    for text in ("one", "another"):
        (tmp_path / "own.jsonl").write_text(text)
        folders.append(folder(f"--data {tmp_path / 'own.jsonl'}"))
    assert len(set(folders)) == len(folders) and all("-sft-s" in path.name for path in folders)
    for same in ("--micro-batch 3 --dtype autocast", "--algo ppo --name x", "--no-reflection"):
        assert folder(same, *([] if "micro" in same else [rl.OPTIONS])) == folders[0]
    assert folder("--batch 2 --algo ppo", rl.OPTIONS) == folder("--batch 2")
    assert folder("--negatives 0") == folder("--no-negatives")


def test_no_negatives_trains_on_none(bases, tmp_path, monkeypatch):
    options = [*tiny_options(bases["gpt2"], tmp_path), "--no-negatives", "--stage", "plain"]
    run_script(sft, *options, monkeypatch=monkeypatch)
    records = negatives.read_records(sft_folder(tmp_path) / "data" / "train.jsonl")
    assert records and not any(record.negative or record.mistake for record in records)


LONG = "word " * 600
TOO_LONG = [("reflect", 508, "x", "x", "x"), ("reflect", 8, "x", LONG, "x"), ("reflect", 8, LONG, "x", "x")]
TOO_LONG += [("policy", 8, "x", "x", LONG), ("policy", 480, "x", "x", "x"), ("plain", 8, "x", "x", LONG)]


@pytest.mark.parametrize("stage, limit, state, reflection, action", TOO_LONG)
@pytest.mark.parametrize("trajectory", [0, 5])
def test_lengths_are_checked_first(trajectory, stage, limit, state, reflection, action, bases, tmp_path, monkeypatch):
    """Catches a text that does not fit, of any stage, in the held-out records too, or together with --max-reflection,
    and is found after an hour of training."""
    records = []
    for number in range(6):  # the last of six trajectories is held out
        texts = (state, reflection, ("a", action)) if number == trajectory else ("s", "r", ("a", "b"))
        records.append(negatives.Record(number, False, False, *texts, 0))
    negatives.write_lines(tmp_path / "own.jsonl", records)
    monkeypatch.setattr(sft, "fit", None)
    options = [*tiny_options(bases["llama"], tmp_path), "--data", tmp_path / "own.jsonl", "--max-reflection", limit]
    options += ["--stage", "plain"] if stage == "plain" else []
    with pytest.raises(UserError, match=f"stage {stage}: .* exceeds the model's context of 512"):
        run_script(sft, *options, monkeypatch=monkeypatch)


def test_a_second_run_waits_for_the_first(bases, runs, monkeypatch):
    """Catches two `rl.py` started together that write one SFT run: the second goes on when the first is done."""
    (sft_folder(runs) / "policy" / "adapter_config.json").unlink()
    began = threading.Event()
    monkeypatch.setattr(sft, "fit", lambda *rest: began.set())
    options = tiny_options(bases["gpt2"], runs)
    args = resolved(*options, tables=(sft.DATA_OPTIONS, sft.OPTIONS))
    first = plumbing.runs.Run(sft_folder(runs), sft.sft_args(args), resume=True)
    second = threading.Thread(target=lambda: run_script(sft, *options, monkeypatch=monkeypatch))
    second.start()
    assert not began.wait(1)
    first.lock.release()
    second.join()
    assert began.is_set()


def test_mended_records_under_the_same_name_have_another_folder(tmp_path):
    """Catches adapters of the old records that count as done after the file was mended."""
    path = tmp_path / "records.jsonl"
    tables, names = (sft.DATA_OPTIONS, sft.OPTIONS), set()
    for content in ("old", "mended"):
        path.write_text(content)
        names.add(sft.folder_of(resolved("--data", path, "--device", "cpu", tables=tables)).name)
    assert len(names) == 2
