"""Speed and memory of the online stage, as ratios within one run: the same model, tasks, seeds and machine.

1. Rollout, in environment steps a second: `reflect_rl.play` with `Players` against a plain version that calls Hugging
   Face's `generate` for the reflection and for the one-token action at every step. The plain version has no memo and
   does not refill its batch: a batch of environments is played until the last of them is done (the usual way); and
   one environment at a time, which is how the shortest scripts do it. Both play greedily with the same prompts, so all
   play the same episodes: the table says how many of their steps agree. "memo warm" is the steady state of a
   training: every state has been reflected on before, and the policy has just changed, so that no action's probability
   is known yet. "memo off" forgets both at every turn: only equal states of one turn share them. "decoding free" has
   the reflections from the memo but reads the reflector's prompts all the same: no decoder gets further without a memo.
2. The update: forward and backward of the policy-gradient loss on the steps that were played, by `Learner.minibatch`
   (the head at one position, label rows only, equal prompts once), against full-vocabulary logits at every position
   of every prompt. Also with equal prompts removed from the plain one, which leaves the cost of the logits alone.
3. Memory: parameters and buffers of two players against one, at GPT-2 XL's shape, LoRA r 16, on the meta device.

    python benchmarks/online_speed.py                # adapters of the newest run, else random ones
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GPT2Config

import eval as evaluation
import rl
import sft
from envs import UserError, run_main
from reflect_rl import (
    Players,
    adapter_parameters,
    add_adapter,
    add_common_options,
    encode,
    env_factory,
    find_adapters,
    load_base,
    load_players,
    newest_run,
    parse_args,
    play,
    reflector_prompt,
    use_adapter,
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
    def __call__(self, states, actions, envs):
        players, reflections = self.players, [None] * len(states)
        if players.reflection:
            written = self.generate([reflector_prompt(s) for s in states], "reflect", players.max_reflection)
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            cut = [self.tokenizer.eos_token_id not in row.tolist() for row in written]
            reflections = [players.close(text, c) for text, c in zip(texts, cut, strict=True)]
        prompts = [players.prompt(*row) for row in zip(states, reflections, actions, strict=True)]
        menus = [list(players.label_ids(menu)) for menu in actions]
        answers = self.generate(prompts, "policy", 1, lambda row, _: menus[row])[:, 0].tolist()
        return reflections, [
            [0.0 if label == answer else -torch.inf for label in menu]
            for menu, answer in zip(menus, answers, strict=True)
        ]


def play_in_batches(actor, make_env, tasks, batch):
    """Without refilling: the next batch of environments starts when the last of this one is done."""
    groups = [tasks[i : i + batch] for i in range(0, len(tasks), batch)]
    return [e for group in groups for e in play(actor, make_env, group, greedy=True, batch=batch)]


def forgetful(players):
    """The players with nothing remembered at every turn."""

    def act(states, actions, envs):
        players.clear_memo()
        players.known.clear()
        return players(states, actions, envs)

    return act


def given_the_texts(players):
    """The players with no score remembered, who read both prompts of every turn but need not write the reflections."""

    def act(states, actions, envs):
        players.known.clear()
        with torch.no_grad():
            players.features([reflector_prompt(state) for state in states], "reflect")
        return players(states, actions, envs)

    return act


def timed(run):
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def moves(episodes):
    return [[step.action for step in episode.steps] for episode in episodes]


def rollouts(players, make_env, tasks, batch, single):
    """`(name, episodes, seconds)` of each way to play; the first `single` tasks only where one is played at a time."""
    plain = PlainPlayers(players)
    players.clear_memo()
    rows = [("plain, one batch until all are done", *timed(lambda: play_in_batches(plain, make_env, tasks, batch)))]
    one = timed(lambda: play_in_batches(plain, make_env, tasks[:single], 1))
    rows.append((f"plain, one at a time ({single} episodes)", *one))
    off = timed(lambda: play(forgetful(players), make_env, tasks, greedy=True, batch=batch))
    rows.append(("ours, memo off", *off))
    players.clear_memo()
    players.known.clear()
    rows.append(("ours, memo cold", *timed(lambda: play(players, make_env, tasks, greedy=True, batch=batch))))
    free = timed(lambda: play(given_the_texts(players), make_env, tasks, greedy=True, batch=batch))
    rows.append(("ours, memo off, decoding free", *free))
    players.known.clear()
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


def plain_gradient(learner, batch, chosen, micro_batch):
    """Backward of the policy-gradient loss with the logits of the whole vocabulary at every position."""
    players, tokenizer = learner.players, learner.players.tokenizer
    use_adapter(players.model, "policy")
    for start in range(0, len(chosen), micro_batch):
        part = chosen[start : start + micro_batch]
        rows = [torch.tensor(encode(tokenizer, batch.prompts[i])) for i in part]
        last = torch.tensor([len(row) - 1 for row in rows])
        ids = pad_sequence(rows, batch_first=True).to(players.device)  # right padding: a causal model needs no mask
        logits = players.model(ids, use_cache=False).logits.float()  # (B, T, V)
        rows = [logits[i, end, list(batch.menus[step])] for i, (end, step) in enumerate(zip(last, part, strict=True))]
        log_probs = pad_sequence(rows, batch_first=True, padding_value=-torch.inf).log_softmax(-1)
        log_prob = log_probs.gather(1, batch.action[part][:, None].to(logits.device))[:, 0]
        (-(log_prob * batch.advantage[part].to(logits.device)).sum() / len(chosen)).backward()


def gradient(learner):
    return torch.cat([p.grad.flatten() for p in adapter_parameters(learner.players.model, "policy")])


def updates(players, episodes, args):
    """`(name, steps, prompts, seconds, distance of the gradient from ours)` of each way to differentiate a batch."""
    learner = rl.Learner(players, args)
    batch = rl.make_batch(learner, episodes, args)
    everything, kept = list(range(len(batch.prompts))), []
    learner.optimizer.step = lambda: kept.append(gradient(learner))
    _, seconds = timed(lambda: learner.minibatch(batch, everything, 0.0, rl.collections.Counter()))
    rows = [("ours", len(everything), len(set(batch.prompts)), seconds, 0.0)]
    once = list({prompt: i for i, prompt in enumerate(batch.prompts)}.values())
    for name, chosen in (("full logits, every prompt", everything), ("full logits, equal prompts once", once)):
        _, seconds = timed(lambda chosen=chosen: plain_gradient(learner, batch, chosen, args.micro_batch))
        distance = ((gradient(learner) - kept[0]).norm() / kept[0].norm()).item()
        rows.append((name, len(chosen), len(chosen), seconds, distance if chosen is everything else None))
        learner.optimizer.zero_grad()
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


def print_memory():
    """Two players against one, and against the two LMs that the paper's formulation has."""
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


def make_players(args):
    """The players of `--run`, of the newest run, or fresh random ones."""
    try:
        run = args.run or newest_run(args)
    except UserError:
        model, tokenizer = load_base(args.base, args.device)
        torch.manual_seed(args.seed)
        for name in ("reflect", "policy"):
            add_adapter(model, name)
            for parameter in adapter_parameters(model, name)[1::2]:  # the B matrices
                torch.nn.init.normal_(parameter, std=0.02)
        return Players(model, tokenizer, bf16=args.bf16, max_reflection=args.max_reflection), "random adapters"
    return load_players(args, find_adapters(run)), str(run)


def main():
    parser = argparse.ArgumentParser(description="Ratios of speed and memory.", allow_abbrev=False)
    add_common_options(parser)
    sft.add_sft_options(parser)
    rl.add_rl_options(parser)
    evaluation.add_panel_options(parser.add_argument_group("evaluation"))
    parser.add_argument("--run", help="run whose adapters play (default: the newest)")
    parser.add_argument("--tasks", type=int, default=48, help="episodes (default: 48)")
    parser.add_argument("--single", type=int, default=6, help="episodes played one at a time (default: 6)")
    parser.add_argument("--parallel", type=int, default=16, help="environments in a batch (default: 16)")
    args = parse_args(parser)
    rl.resolve(args)
    players, source = make_players(args)
    tasks, make_env = env_factory(args)().tasks("train")[: args.tasks], env_factory(args)
    print(f"{args.env}, base {args.base}, {source}, {torch.get_num_threads()} threads, {args.device}")
    play(players, make_env, tasks[:4], greedy=True)  # warm up
    rows = rollouts(players, make_env, tasks, args.parallel, args.single)
    print_rollouts(rows, args.parallel)
    print_updates(updates(players, rows[-1][1], args))
    print_memory()


if __name__ == "__main__":
    run_main(main)
