"""Several processes (gloo, CPU): two with half the batch each give the numbers of one with the whole batch."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from online_helpers import ROOT, last_state, make_start, read_log, run_options, run_process, start_process
from safetensors.torch import load_file

import reflect_rl

OF_THE_CACHE = ("episodes_per_s", "cache_hits", "cut_reflections")  # each process has a memo of its own
ALGORITHMS = {
    "reinforce": ["--algo", "reinforce", "--replay", 2],
    "grpo": ["--algo", "grpo", "--kl", 0.1],
    "ppo": ["--algo", "ppo", "--warmup", 2],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start"))


def rendezvous(world):
    """The environment variables that torchrun gives to each of `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_together(options, adapters, folder, world=2):
    """A run of `world` processes to its end; what each printed."""
    outputs = [folder / f"out{rank}" for rank in range(world)]
    processes = [
        start_process(options, adapters, output, environment)
        for output, environment in zip(outputs, rendezvous(world), strict=True)
    ]
    for process in processes:
        process.join()
    texts = [output.read_text() for output in outputs]
    assert [process.exitcode for process in processes] == [0] * world, "\n".join(texts)
    return texts


def assert_close_runs(one, other):
    """Every figure to 1e-5, every weight of the adapters and of the critic to 1e-4."""
    lines, others = read_log(one, OF_THE_CACHE), read_log(other, OF_THE_CACHE)
    assert len(lines) == len(others) > 0
    for line, expected in zip(lines, others, strict=True):
        texts = {key: value for key, value in line.items() if isinstance(value, str)}
        assert texts == {key: value for key, value in expected.items() if isinstance(value, str)}
        numbers = {key: value for key, value in line.items() if key not in texts}
        assert numbers == pytest.approx({key: expected[key] for key in numbers}, abs=1e-5, rel=1e-4)
        assert set(line) == set(expected)
    for name in ("reflect", "policy"):
        weights, found = (load_file(run / name / "adapter_model.safetensors") for run in (other, one))
        torch.testing.assert_close(found, weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(last_state(one)["critic"], last_state(other)["critic"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_two_processes_equal_one(algo, start, tmp_path):
    """Bugs: gradients averaged over unequal shares, an episode played twice or by nobody, figures of one rank only."""
    more = [*ALGORITHMS[algo], "--updates", 4, "--epochs", 1] if algo != "reinforce" else ALGORITHMS[algo]
    one, two = (run_options(start[0], tmp_path / name, *more) for name in ("one", "two"))
    run_process(one, start[1], tmp_path / "out")
    printed = run_together(two, start[1], tmp_path)
    assert_close_runs(tmp_path / "two" / "run", tmp_path / "one" / "run")
    assert printed[1].strip() == "", "only rank 0 has something to say"


def test_three_processes_with_unequal_shares_resume_as_two(start, tmp_path):
    """Eight episodes do not divide by three, and a run may go on with other processes than it began with."""
    more = ["--algo", "ppo", "--updates", 4, "--save-every", 2]
    one, many = (run_options(start[0], tmp_path / name, *more) for name in ("one", "many"))
    run_process(one, start[1], tmp_path / "out")
    run_together(many, start[1], tmp_path, world=3)
    run = tmp_path / "many" / "run"
    newest = reflect_rl.checkpoints(run)[-1]
    newest.rename(run / "gone")  # as if it had been killed before its last checkpoint
    for name in ("reflect", "policy"):
        (run / name / "adapter_config.json").unlink()
    run_together([*many, "--resume"], start[1], tmp_path, world=2)
    assert_close_runs(run, tmp_path / "one" / "run")


def test_counters_of_all_processes_survive_a_resume(start, tmp_path):
    """Bug: only rank 0's are saved, or all ranks go on with the sum and it counts twice. Hits and misses together are
    the states that were reflected on, whoever remembers what."""
    one, two = (run_options(start[0], tmp_path / name, "--updates", 4) for name in ("one", "two"))
    run_process(one, start[1], tmp_path / "out")
    run_together(two, start[1], tmp_path)
    run = tmp_path / "two" / "run"
    reflect_rl.checkpoints(run)[-1].rename(run / "gone")
    for name in ("reflect", "policy"):
        (run / name / "adapter_config.json").unlink()
    run_together([*two, "--resume"], start[1], tmp_path)
    expected, found = last_state(tmp_path / "one" / "run")["counts"], last_state(run)["counts"]
    assert found["hits"] + found["misses"] == expected["hits"] + expected["misses"] > 0


def test_a_signal_to_one_process_stops_all_after_the_save(start, tmp_path):
    """Bug: the signalled process leaves while rank 0 still saves, for which torchrun kills rank 0."""
    options = run_options(start[0], tmp_path / "runs", "--updates", 50, "--eval-every", 1, "--repeats", 20)
    run, outputs = tmp_path / "runs" / "run", [tmp_path / "out0", tmp_path / "out1"]
    processes = [
        start_process(options, start[1], output, environment)
        for output, environment in zip(outputs, rendezvous(2), strict=True)
    ]
    while all(process.is_alive() for process in processes) and not (run / "step-000002").exists():
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    processes[1].join()
    newest = reflect_rl.checkpoints(run)[-1]  # rank 1 has left: it must be there already
    processes[0].join()
    texts = [output.read_text() for output in outputs]
    assert [process.exitcode for process in processes] == [1, 1], "\n".join(texts)
    assert int(newest.name[5:]) == len(read_log(run)) < 50 and "--resume" in texts[0]


def test_torchrun_runs_the_whole_pipeline(start, tmp_path):
    """`torchrun --nproc-per-node 2 rl.py`: SFT by one process, training by both, one table. Bug: it hangs."""
    sizes = ["--trajectories", 6, "--reflect-steps", 2, "--policy-steps", 2, "--batch", 4, "--rank", 4]
    options = [*run_options(start[0], tmp_path / "runs", "--updates", 2), *map(str, sizes)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "rl.py", *options]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("95% Wilson") == 1
    assert len(read_log(tmp_path / "runs" / "run")) == 2
