"""Several processes (torchrun), each with its share of the work."""

import collections
import contextlib
import datetime
import os

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined_processes(args):
    """Under torchrun: join the other processes, each with a GPU of its own where there are GPUs; part at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = args.device.startswith("cuda")
    # The others wait while rank 0 runs SFT or an evaluation, which may take longer than the default ten minutes.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=2))
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world()))))
    try:
        yield
        dist.barrier()  # nobody leaves while rank 0 still evaluates
    finally:
        dist.destroy_process_group()


def sum_gradients(parameters):
    """Add up the gradients of all processes, each of which saw its share of the batch."""
    if world() == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a process may have had no step at all
        dist.all_reduce(p.grad)


def total(counts):
    """The sum of all processes' `Counter`s."""
    whole = collections.Counter()
    for share in gather(dict(counts)):
        whole.update(share)
    return whole


def gather(value):
    """The values of all processes, in the order of their ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values
