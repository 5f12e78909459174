"""Speed and memory of the online stage, as ratios within one run: the same model, tasks, seeds and machine.

1. Rollout, in environment steps a second: `reflect_rl.play` with `Players` against a plain version that calls Hugging
   Face's `generate` for the reflection and for the one-token action at every step. The plain version has no memo and
   does not refill its batch: a batch of environments is played until the last of them is done (the usual way); and
   one environment at a time, which is how the shortest scripts do it. Both play greedily with the same prompts, so all
   play the same episodes: the table says how many of their steps agree. "memo warm" is the steady state of a
   training: every state has been reflected on before, and the policy has just changed, so that no action's probability
   is known yet. "memo off" forgets both at every turn: only equal states of one turn share them. "decoding free" has
   the reflections from the memo but reads the reflector's prompts all the same: no decoder gets further without a memo.
2. The update: forward and backward of the policy-gradient loss on the steps that were played, by `rl.update`
   (logits at one position, equal prompts once), against full-vocabulary logits at every position
   of every prompt. Also with equal prompts removed from the plain one, which leaves the cost of the logits alone.
3. Memory: parameters and buffers of two players against one, at GPT-2 XL's shape, LoRA r 16, on the meta device.

    python benchmarks/online_speed.py --run runs/taxi-rl-s0
"""

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GPT2Config

import rl
import sft
from envs import run_main
import reflect_rl
from plumbing.options import COMMON, add_options, env_factory, parse_args
from plumbing.runs import adapters_of, as_trained
from reflect_rl import (
    adapter_parameters, add_adapter, load_players, one_line, play, reflector_prompt, right_pad, use_adapter,
)

# ---------------------------------------------------------------------------------------------------------
# Rollout


class PlainPlayers:
    """The same two players by way of `generate`, at every step anew; an actor for `play`."""

    def __init__(self, players):
        self.players, self.tokenizer = players, players.tokenizer
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def generate(self, prompts, adapter, tokens, allowed=None):
        """The new token ids, (B, <= tokens), greedy."""
        use_adapter(self.players.model, adapter)
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.players.device)
        inputs.pop("token_type_ids", None)
        written = self.players.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            prefix_allowed_tokens_fn=allowed,
        )
        return written[:, inputs["input_ids"].shape[1] :]

    @torch.no_grad()
    def __call__(self, episodes, known):
        players, states = self.players, [episode.state for episode in episodes]
        reflections = [None] * len(states)
        if players.reflection:
            written = self.generate([reflector_prompt(s) for s in states], "reflect", players.max_reflection)
            for i, text in enumerate(self.tokenizer.batch_decode(written, skip_special_tokens=True)):
                reflections[i] = one_line(text)
                if self.tokenizer.eos_token_id not in written[i].tolist():  # cut: end with the last whole sentence
                    reflections[i] = reflections[i][: reflections[i].rfind(".") + 1] or reflections[i]
        steps = players.steps(states, [episode.actions for episode in episodes], reflections)
        menus = [list(step.label_ids) for step in steps]
        prompts = [step.prompt for step in steps]
        answers = self.generate(prompts, "policy", 1, lambda row, _: menus[row])[:, 0].tolist()
        for step, answer in zip(steps, answers, strict=True):
            step.log_probs = [0.0 if label == answer else -torch.inf for label in step.label_ids]
        return steps


def play_in_batches(actor, make_env, tasks, batch):
    """Without refilling: the next batch of environments starts when the last of this one is done."""
    groups = [tasks[i : i + batch] for i in range(0, len(tasks), batch)]
    return [e for group in groups for e in play(actor, make_env, group, greedy=True, batch=batch)]


def forgetful(players):
    """The players with nothing remembered at every turn."""

    def act(episodes, known):
        players.reflections.clear()
        return players(episodes, {})

    return act


def given_the_texts(players):
    """The players who read both prompts of every turn but need not write the reflections."""

    def act(episodes, known):
        states = list(dict.fromkeys(episode.state for episode in episodes))
        use_adapter(players.model, "reflect")
        rows = [players.tokenizer(reflector_prompt(state))["input_ids"] for state in states]
        with torch.inference_mode():
            players.model(right_pad(rows, players.device), use_cache=True, logits_to_keep=1)
        return players(episodes, {})

    return act


def timed(run):
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def moves(episodes):
    return [[step.action for step in episode.steps] for episode in episodes]


def rollouts(players, make_env, tasks, batch, single):
    """`(name, episodes, seconds)` of each way to play; the first `single` tasks only where one is played at a time."""
    plain = PlainPlayers(players)
    players.reflections.clear()
    rows = [("plain, one batch until all are done", *timed(lambda: play_in_batches(plain, make_env, tasks, batch)))]
    one = timed(lambda: play_in_batches(plain, make_env, tasks[:single], 1))
    rows.append((f"plain, one at a time ({single} episodes)", *one))
    off = timed(lambda: play(forgetful(players), make_env, tasks, greedy=True, batch=batch))
    rows.append(("ours, memo off", *off))
    players.reflections.clear()
    rows.append(("ours, memo cold", *timed(lambda: play(players, make_env, tasks, greedy=True, batch=batch))))
    free = timed(lambda: play(given_the_texts(players), make_env, tasks, greedy=True, batch=batch))
    rows.append(("ours, memo off, decoding free", *free))
    rows.append(("ours, memo warm", *timed(lambda: play(players, make_env, tasks, greedy=True, batch=batch))))
    return rows


def print_rollouts(rows, batch):
    reference = sum(len(e.steps) for e in rows[0][1]) / rows[0][2]
    print(f"\n1. Rollout, greedy, batches of {batch}\n")
    print("| | episodes | steps | steps/s | ratio | same moves |\n| --- | --- | --- | --- | --- | --- |")
    for name, episodes, seconds in rows:
        steps = sum(len(e.steps) for e in episodes)
        same = sum(a == b for a, b in zip(moves(episodes), moves(rows[0][1]), strict=False)) / len(episodes)
        speed = steps / seconds
        print(f"| {name} | {len(episodes)} | {steps} | {speed:.1f} | {speed / reference:.1f}x | {same:.0%} |")


# ---------------------------------------------------------------------------------------------------------
# Update


def plain_gradient(players, steps, micro_batch):
    """Backward of the policy-gradient loss with the logits of the whole vocabulary at every position."""
    use_adapter(players.model, "policy")
    for start in range(0, len(steps), micro_batch):
        part = steps[start : start + micro_batch]
        rows = [torch.tensor(step.ids) for step in part]
        ids = pad_sequence(rows, batch_first=True).to(players.device)  # right padding: a causal model needs no mask
        logits = players.model(ids, use_cache=False).logits.float()  # (B, T, V)
        rows = [logits[i, len(step.ids) - 1, list(step.label_ids)] for i, step in enumerate(part)]
        log_probs = pad_sequence(rows, batch_first=True, padding_value=-torch.inf).log_softmax(-1)
        action = torch.tensor([step.action for step in part], device=logits.device)
        advantage = torch.tensor([step.advantage for step in part], device=logits.device)
        log_prob = log_probs.gather(1, action[:, None])[:, 0]
        (-(log_prob * advantage).sum() / len(steps)).backward()


def gradient(players):
    return torch.cat([p.grad.flatten() for p in adapter_parameters(players.model, "policy")])


def updates(players, episodes, args):
    """`(name, steps, prompts, seconds, distance of the gradient from ours)` of each way to differentiate a batch."""
    args = copy.copy(args)
    args.entropy, kept = 0.0, []
    _, _, optimizer = rl.make_learner(args, players, {})
    optimizer.step = lambda: kept.append(gradient(players))
    rl.give_advantages(episodes, args, players, None)
    steps = [step for episode in episodes for step in episode.steps]
    clip, rl.CLIP_NORM = rl.CLIP_NORM, float("inf")
    _, seconds = timed(lambda: rl.update(steps, players, None, optimizer, args, 0))
    rl.CLIP_NORM = clip
    once = list({step.prompt: step for step in steps}.values())
    rows = [("ours", len(steps), len(once), seconds, 0.0)]
    for name, chosen in (("full logits, every prompt", steps), ("full logits, equal prompts once", once)):
        _, seconds = timed(lambda chosen=chosen: plain_gradient(players, chosen, args.micro_batch))
        distance = ((gradient(players) - kept[0]).norm() / kept[0].norm()).item()
        rows.append((name, len(chosen), len(chosen), seconds, distance if chosen is steps else None))
        optimizer.zero_grad()
    return rows


def print_updates(rows):
    print("\n2. Update: forward and backward of one batch\n")
    print("| | steps | prompts | seconds | ratio | gradient differs by |\n| --- | --- | --- | --- | --- | --- |")
    for name, steps, prompts, seconds, distance in rows:
        differs = "other steps" if distance is None else f"{distance:.0e}"
        print(f"| {name} | {steps} | {prompts} | {seconds:.2f} | {seconds / rows[0][3]:.1f}x | {differs} |")


# ---------------------------------------------------------------------------------------------------------
# Memory


def size(model):
    """Bytes of parameters and buffers; those on the meta device have a size, but no memory."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def conv_layers(model, kinds, ids):
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (reflect_rl.Conv1D, reflect_rl.LoRALinear)) and not path.endswith(".base"):
            found[path] = module
    return found


def print_memory():
    """Two players against one, and against the two LMs that the paper's formulation has."""
    # On the meta device no pass can show which layers are called: of GPT-2 all are.
    reflect_rl.plain_layers = conv_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
        bare = size(model)
        add_adapter(model, "policy", 16, 8)
        one = size(model)
        add_adapter(model, "reflect", 16, 8)
        two = size(model)
    print(f"\n3. Memory at GPT-2 XL's shape ({bare / 4e9:.2f}B parameters, fp32), LoRA r 16\n")
    print(
        f"one player {one / 1e9:.3f} GB, two players {two / 1e9:.3f} GB: {two / one:.4f}x; two LMs {2 * one / one:.0f}x"
    )


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Ratios of speed and memory.")
    own = {
        "run": ("", "run whose adapters play"),
        "tasks": (48, "episodes"),
        "single": (6, "episodes played one at a time"),
        "parallel": (16, "environments in a batch"),
    }
    add_options(parser, COMMON, sft.DATA_OPTIONS, sft.OPTIONS, rl.OPTIONS, own)
    args = parse_args(parser)
    rl.resolve(args)
    args = as_trained(args, args.run)
    players, make_env = load_players(args, adapters_of(args.run)), env_factory(args)
    tasks = make_env().tasks("train")[: args.tasks]
    print(f"{args.env}, base {args.base}, {args.run}, {torch.get_num_threads()} threads, {args.device}")
    play(players, make_env, tasks[:4], greedy=True)  # warm up
    rows = rollouts(players, make_env, tasks, args.parallel, args.single)
    print_rollouts(rows, args.parallel)
    print_updates(updates(players, rows[-1][1], args))
    print_memory()


if __name__ == "__main__":
    run_main(main)
