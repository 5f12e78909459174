"""Tiny random models in four shapes with three kinds of tokenizer, made offline, and one trained run to work with."""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import envs
import plumbing.options
import negatives
import reflect_rl
import sft

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@functools.cache
def load_script(path):
    """A maker that stands beside its data, such as `models/nano/make.py`, as a module."""
    name = f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def sample_texts():
    """Enough text of the project's own kind for three small vocabularies; "10" is frequent."""
    texts = ["10 100 10\n" * 50]
    for r in negatives.make_records(envs.DangerousTaxi, 5, 0.5, seed=0)[0]:
        menu = "".join(f"{i} {action}\n" for i, action in enumerate(r.actions))
        texts.append(f"{r.state}\n{r.reflection}\n{menu}")
    return texts


def digit_tokenizer():
    """The project's own: byte-level, every digit a token of its own, and every label behind a space."""
    labels = "".join(f" {label}" for label in reflect_rl.LABELS)
    return load_script("models/nano/make.py").train_tokenizer([*sample_texts(), labels * 200], 400)


def gpt2_tokenizer():
    """GPT-2's: byte-level BPE that merges digits, no BOS, padding = EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama_tokenizer():
    """Llama 2's: a space is put before the text, unknown characters (the newline!) fall back to bytes, BOS is added."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
        initial_alphabet=[chr(i) for i in range(33, 127)],
    )
    tokenizer.train_from_iterator([line for text in sample_texts() for line in text.splitlines()], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(special)]  # the byte tokens are ordinary ones
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


TOKENIZERS = {"digit-splitting": digit_tokenizer, "GPT-2-like": gpt2_tokenizer, "SentencePiece-like": llama_tokenizer}


@pytest.fixture(scope="session")
def tokenizers():
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


# ---------------------------------------------------------------------------------------------------------
# Models


def common(vocabulary):
    """The fields that Llama, Mistral and Qwen2 share. Wide initial weights: their logits differ visibly."""
    return dict(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )


def gpt2_model(vocabulary):
    """Conv1D layers, learned positions, tied head; with dropout, which must stay off."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048, "initializer_range": 0.2}
    dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape, **dropout))


SHAPES = {
    "gpt2": (gpt2_model, "digit-splitting"),
    "llama": (lambda v: LlamaForCausalLM(LlamaConfig(**common(v))), "SentencePiece-like"),
    "mistral": (lambda v: MistralForCausalLM(MistralConfig(**common(v), sliding_window=300)), "GPT-2-like"),
    # AutoTokenizer puts Qwen2's own pre-tokenizer, which splits digits, in place of what was saved
    "qwen2": (lambda v: Qwen2ForCausalLM(Qwen2Config(**common(v), tie_word_embeddings=True)), "GPT-2-like"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizers):
    """`{shape: folder}` of the four random base LMs."""
    folders = {}
    for name, (make, kind) in SHAPES.items():
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp("bases") / name
        make(len(tokenizers[kind])).save_pretrained(folders[name])
        tokenizers[kind].save_pretrained(folders[name])
    return folders


@pytest.fixture(params=list(SHAPES))
def base(request, bases):
    return bases[request.param]


def scaled(kind, vocabulary):
    """A random LM that does more to its logits than to multiply by its head: it caps or scales them."""
    torch.manual_seed(1)
    if kind == "gemma2":  # logits far beyond the cap
        fields = {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 300, "hidden_activation": "gelu"}
        model = Gemma2ForCausalLM(Gemma2Config(**common(vocabulary), **fields))
    elif kind == "granite":
        model = GraniteForCausalLM(GraniteConfig(**common(vocabulary), logits_scaling=7.0))
    else:
        model = CohereForCausalLM(CohereConfig(**common(vocabulary), logit_scale=0.1))
    return model.eval()


def randomise(model, *names, scale=0.3):
    """Give adapters random B matrices: at B = 0 most mistakes would not show."""
    torch.manual_seed(2)
    for layer in reflect_rl.lora_layers(model).values():
        for name in names:
            torch.nn.init.normal_(layer.lora_B[name], std=scale)


def make_players(folder, **options):
    """Two players with random adapters on a base."""
    return players_on(*reflect_rl.load_base(folder), **options)


def players_on(model, tokenizer, **options):
    torch.manual_seed(0)
    for name in ("reflect", "policy"):
        reflect_rl.add_adapter(model, name, 4, 8)
    randomise(model, "reflect", "policy")
    return reflect_rl.Players(model, tokenizer, **{"max_reflection": 12, **options})


def rows_of(model):
    """A list that gets the number of texts of each forward pass from now on."""
    rows = []

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows.append(len(ids))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return rows


@pytest.fixture
def players(base):
    return make_players(base)


def taxi_states(n=6):
    """Maps, some with much text behind them, so that a batch has rows of different lengths."""
    env, states = envs.make("taxi"), []
    for i, task in enumerate(env.tasks("train")[:n]):
        states.append(env.reset(options={"task": task})[0] + " And so on." * (3 * i % 7))
    return states


# ---------------------------------------------------------------------------------------------------------
# Running the scripts


class Killed(BaseException):
    """Stands in for a kill in tests that stay in one process: no `except` of the project may catch it."""


def run_script(module, *options, monkeypatch):
    """`python module.py options` in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
    module.main()


def resolved(*options, tables=()):
    """The options that a script with COMMON and these tables makes of a command line."""
    parser = argparse.ArgumentParser()
    plumbing.options.add_options(parser, plumbing.options.COMMON, *tables)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, options)])
        return plumbing.options.parse_args(parser)


def subprocess_of(*command, code=0, **options):
    """Run Python on a script or `-c` text in a process of its own, from the repository root; stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    options = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT, **options}
    done = subprocess.run(command, **options)
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def tiny_options(base, runs):
    """Options of a run of a second or two on Corridor, for every script; SFT's are those of RL."""
    where = ["--env", "corridor:Corridor", "--base", base, "--runs", runs, "--device", "cpu"]
    size = ["--trajectories", 10, "--reflect-steps", 3, "--policy-steps", 3, "--max-reflection", 8]
    return [*where, *size]


def tiny_rl_options(base, runs):
    return [*tiny_options(base, runs), "--updates", 4, "--episodes", 8, "--eval-every", 2, "--repeats", 1]


@pytest.fixture(scope="session")
def sft_runs(tmp_path_factory, bases):
    """A runs folder with one finished SFT run of Corridor on the GPT-2 shape; copy it (`runs`), do not write in it."""
    folder = tmp_path_factory.mktemp("sft") / "runs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in ("plain", "reflect", "policy"):
            run_script(sft, *tiny_options(bases["gpt2"], folder), "--stage", stage, monkeypatch=monkeypatch)
    return folder


@pytest.fixture
def runs(sft_runs, tmp_path):
    """A copy of the trained SFT run, to go on from."""
    return shutil.copytree(sft_runs, tmp_path / "runs")


def sft_folder(runs):
    """The one SFT run of Corridor; the end of its name depends on its settings."""
    [folder] = Path(runs).glob("corridor-sft-s0-*")
    return folder


def read_log(run):
    """The lines of a run's log, one an update, without the figures that depend on the clock."""
    lines = []
    for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        figures = json.loads(line)
        figures.pop("episodes_per_s", None)
        lines += [figures] if figures["step"] else []
    return lines


def table_of(out):
    """The rows of an output's last results table, in order: `{name: [records, updates, episodes, sampled, ...]}`."""
    rows = {}
    for line in out.rpartition("Success on the")[2].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("The sampled episodes", "Differences")):  # the other tables
            break
        if line.startswith("| ") and name and set(name) != {"-"}:
            rows[name] = cells
    return rows
