"""What is looked at before a base is trained: is it sound, does it know the words, is there memory for it.

Also how to need less memory: gradient checkpointing.
"""

import functools
import os
import random
import re
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import envs
import reflect_rl
from envs import UserError
from plumbing.contract import check

MANY_STRANGE = 0.2  # share of words that is worth a line


def check_base(model, tokenizer, path):
    """A `UserError` where a base could not be trained, or would not do what the two players need."""
    if not reflect_rl.encode(tokenizer, reflect_rl.ACTION_HEADER):
        raise UserError(f"{path} holds no tokenizer")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer of {path} has {len(tokenizer)} tokens, and its model only {rows}")
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(f"the tokenizer of {path} has no end-of-text token, which ends a reflection")
    if end in reflect_rl.encode(tokenizer, f"{tokenizer.eos_token} a"):
        raise UserError(f"the tokenizer of {path} takes {tokenizer.eos_token} in a text for its end")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path} has weights that are not finite")
    ids = reflect_rl.probe(model).repeat(2, 1)
    ids[1, -1] += 1  # two texts that differ in their last token
    try:
        with torch.no_grad():
            one, other = model(ids, use_cache=False).logits[:, :-1].float()
    except Exception as error:  # an architecture that reads more than text
        why = reflect_rl.one_line(str(error) or repr(error))
        raise UserError(f"{path} cannot read a text alone: {why[:300]}") from None
    if not torch.allclose(one, other, atol=1e-3 * one.abs().max().item()):
        raise UserError(f"{path} is not causal: its logits depend on later tokens")


def check_own(env, args):
    """Look at an environment that is none of ours before anything is trained on it."""
    if args.env not in envs.ENVS:
        check(env)
        say_strange_words(env, args.base)


def different_words(text):
    return set(re.findall(r"[^\W\d_]+", text))


def say_strange_words(env, base):
    """Print a line where many words of an environment's states are none that its base has met.

    Those that it has met are in words.txt beside it, where its maker wrote one (models/nano/make.py).
    """
    path, words, rng = Path(reflect_rl.NANO if base == "nano" else base) / "words.txt", set(), random.Random(0)
    if not path.is_file():
        return
    for task in env.tasks("train")[:40]:
        state, info = env.reset(seed=0, options={**env.training, "task": task})
        words |= different_words(state)
        over = False
        while not over:  # random play
            state, _, terminated, truncated, info = env.step(rng.randrange(len(info["actions"])))
            words, over = words | different_words(state), terminated or truncated
    share = len(words - set(path.read_text(encoding="utf-8").split())) / max(1, len(words))
    if share > MANY_STRANGE:
        print(f"note: {share:.0%} of the different words in {type(env).__name__}'s states hardly ever occurred in what "
              f"the base {base} was trained on: if it learns little, --base takes any Hugging Face model")


# ---------------------------------------------------------------------------------------------------------
# Memory


def recompute(model):
    """Gradient checkpointing: keep the input of each block only, and compute the rest again in the backward pass."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError("--gradient-checkpointing: this architecture has no blocks that could be computed again")
    for block in blocks:
        block.forward = functools.partial(run_block, block.forward)


def run_block(forward, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside: `most` is what they held together at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:  # no view
                self.count(tensor.untyped_storage().nbytes())
                weakref.finalize(tensor.untyped_storage(), self.count, -tensor.untyped_storage().nbytes())
        return result

    def count(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def say_memory(stage, device, parameters, texts, length, learn):
    """Print what a training will need at its peak and what there is. `learn(n)`: forward and backward pass of n texts.

    One and two texts are tried: what they need grows evenly with their number.
    """
    peaks = []
    for n in (1, 2):
        with Peak() as peak:
            learn(n)
        peaks.append(peak.most)
        for parameter in parameters:
            parameter.grad = None
    held, most = memory_of(torch.device(device))
    moments = 2 * sum(parameter.nbytes for parameter in parameters)  # AdamW's; the gradients are in the peaks
    need = held + moments + peaks[0] + (texts - 1) * (peaks[1] - peaks[0])
    if most:
        line = f"{stage}: needs {need / 1e9:.2f} GB of memory ({texts} texts of {length} tokens at a time)"
        enough = "" if need < most else ": try --micro-batch, --dtype bf16 or --gradient-checkpointing"
        print(f"{line}, there are {most / 1e9:.1f} GB{enough}")


def memory_of(device):
    """Bytes that this process holds on a device, and all that it could hold; 0, 0 where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        return held, held + torch.cuda.mem_get_info(device)[0]
    try:  # Linux
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        free = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        return 0, 0
    return held, held + free
