"""What the tests of the online stage share: a tiny environment, a tiny random start, runs in their own processes.

Runs start from a fork server that has imported everything once: a process costs milliseconds instead of seconds.
"""

import argparse
import multiprocessing
import os
import random
import resource
import sys
from pathlib import Path

import torch
from conftest import read_log
from transformers import GPT2Config, GPT2LMHeadModel

import envs
import eval as evaluation
import reflect_rl
import rl
import sft

ROOT = Path(__file__).parent.parent


class Walk(envs.Env):
    """A corridor with the goal at its right end. At its left end "go left" is no valid action; a jump is fatal.

    Random play succeeds, dies and runs out of time often enough for every branch of the update.
    """

    curriculum = [("near", 0.5, {"near": 1}), ("far", 0.5, {})]
    horizon = 5

    def __init__(self):
        self.rng, self.done = random.Random(), True

    def tasks(self, split):
        start = {"train": 0, "valid": 12, "test": 16}[split]
        return [{"goal": 2 + i % 3, "number": i} for i in range(start, start + (12 if split == "train" else 4))]

    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        self.task = options["task"]
        self.here = self.rng.randrange(2) + (2 if options.get("near") else 0)
        self.here = min(self.here, self.task["goal"] - 1)
        self.steps, self.done, self.success = 0, False, False
        return self.render(), self.info()

    def step(self, action):
        name = self.actions()[action]
        envs.check_action(self, action, self.actions())
        self.here += {"go left": -1, "go right": 1}.get(name, 0)
        self.steps, self.success = self.steps + 1, self.here == self.task["goal"]
        terminated = self.success or name == "jump"
        truncated = not terminated and self.steps >= self.horizon
        self.done = terminated or truncated
        reward = 1.0 if self.success else -0.5 if terminated else -0.1
        return self.render(), reward, terminated, truncated, self.info()

    def actions(self):
        return ("go right", "wait", "jump") if self.here == 0 else ("go left", "go right", "wait", "jump")

    def info(self):
        return {"actions": self.actions(), "success": self.success}

    def render(self):
        return f"{'.' * self.here}W{'.' * (self.task['goal'] - self.here - 1)}G task {self.task['number']}"

    def expert_action(self):
        return self.actions().index("go right")

    def reflection(self, mistake):
        return f"The goal is {self.task['goal'] - self.here} away."


def make_base(folder):
    """A random GPT-2 of two layers and a tokenizer for Walk's texts, as a Hugging Face directory."""
    env = Walk()
    texts = [env.reset(seed=i, options={"task": task})[0] for i, task in enumerate(env.tasks("train"))]
    texts = [f"{t}\n# Analyze:\n# Actions:\nA go left\n# Action:\n" for t in texts]
    tokenizer = sft.train_tokenizer([*texts, " A B C D" * 50], 320)
    torch.manual_seed(1)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_players(base, **options):
    """Two players whose adapters change something (B is random): at B = 0 most mistakes would not show."""
    model, tokenizer = reflect_rl.load_base(base)
    torch.manual_seed(2)
    for name in ("reflect", "policy"):
        reflect_rl.add_adapter(model, name, 4, 8)
        for layer in reflect_rl.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.1)
    return reflect_rl.Players(model, tokenizer, **{"max_reflection": 6, **options})


def make_start(folder):
    """`(base, adapters)`: what an online run starts from, without the time that SFT takes."""
    players = make_players(make_base(folder / "base"))
    rl.save_players(players, folder / "sft")
    return folder / "base", {name: folder / "sft" / name for name in ("reflect", "policy")}


def rl_args(*options):
    """The resolved options of `python rl.py options`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    reflect_rl.add_common_options(parser)
    sft.add_sft_options(parser)
    rl.add_rl_options(parser)
    evaluation.add_panel_options(parser.add_argument_group("evaluation"))
    args = parser.parse_args(["--device", "cpu", "--warmup", "0", "--rl-lr", "1e-3", *map(str, options)])
    args.bf16 = False
    rl.resolve(args)
    return args


def run_options(base, runs, *more):
    """Options of a run of a second or two on Walk."""
    where = ["--env", "online_helpers:Walk", "--base", base, "--runs", runs, "--name", "run", "--max-reflection", 6]
    size = ["--updates", 6, "--episodes", 8, "--save-every", 2, "--eval-every", 3, "--show-every", 0, "--repeats", 1]
    return [str(option) for option in [*where, *size, *more]]


# ---------------------------------------------------------------------------------------------------------
# Runs in a process of their own


def train_in_this_process(options, adapters, output, environment, die_at_file_operation, file_limit):
    """The body of such a process: the online stage alone, on one thread, its output in a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    args = rl_args(*options)
    rl.join_processes(args)
    torch.set_num_threads(1)
    if file_limit:  # bytes; the kernel refuses more, and Python and Rust see an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if die_at_file_operation:
        kill_at_file_operation(die_at_file_operation, args.runs)
    envs.run_main(lambda: rl.train(args, adapters))


def kill_at_file_operation(number, folder):
    """Arm a SIGKILL at the `number`-th open, mkdir, rename or removal below a folder: where a save is most fragile."""
    events, left = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}, [number]

    def count(event, arguments):
        if event in events and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), 9)

    sys.addaudithook(count)


def start_process(options, adapters, output, environment=None, die_at_file_operation=0, file_limit=0):
    """Start such a process and return it; `exitcode` is -9 after a kill."""
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # for the fork server, which outlives a fixture
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["online_helpers"])
    process = context.Process(
        target=train_in_this_process,
        args=(options, adapters, str(output), environment or {}, die_at_file_operation, file_limit),
    )
    process.start()
    return process


def run_process(options, adapters, output, code=0, **more):
    """Run such a process to its end; what it printed."""
    process = start_process(options, adapters, output, **more)
    process.join()
    text = Path(output).read_text()
    assert process.exitcode == code, f"exit code {process.exitcode}, expected {code}:\n{text}"
    return text


# ---------------------------------------------------------------------------------------------------------
# What a run left


def last_state(run):
    """Optimizer, critic, buffer, memo and counters of the newest checkpoint."""
    return torch.load(reflect_rl.checkpoints(run)[-1] / "state.pt", weights_only=True)


def same(one, other):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_equal_runs(one, other):
    """Log, adapters and the whole last state are the same, number by number."""
    assert read_log(one) == read_log(other)
    for name in ("reflect", "policy"):
        files = [Path(run) / name / "adapter_model.safetensors" for run in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), f"the {name} adapters differ"
    states = last_state(one), last_state(other)
    differing = [key for key in states[0] if not same(states[0][key], states[1][key])]
    assert not differing, f"the states differ in {differing}"
