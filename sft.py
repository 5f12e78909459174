"""The supervised stage: reflector and policy learn from the teacher's records (`negatives.py`).

    stage      text                                         loss on                 trains
    reflect    state -> reflection                          reflection and EOS      LoRA "reflect"
    policy     state, reflection, actions -> label          the label, one token    LoRA "policy"
    plain      state, actions -> label (the ablation)       the label, one token    LoRA "policy"

The loss is the mean negative log-likelihood of the completion (the paper's section on warm-up by SFT). Masks are made
from lengths, never from token ids: the EOS that ends a reflection is trained even where it is also the padding.
    python sft.py --env taxi               # reflector, then policy
"""

import argparse
import functools
import hashlib
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import envs
import negatives
from envs import UserError
from plumbing.options import COMMON, add_options, env_factory, parse_args, short_name, updates_or_auto
from plumbing.runs import Run, settings_of, write_budget
from reflect_rl import (
    adapter_parameters, add_adapter, encode_all, forward, load_players, reflector_prompt, right_pad, save_adapter,
    use_adapter,
)

checks = envs.beside("../models/checks.py")
DATA_OPTIONS = negatives.OPTIONS | {
    "data": ("", "train on this JSONL file of records instead of the teacher's; every sixth trajectory is held out"),
}
OPTIONS = {
    "reflect_steps": (400, "updates of the reflector; auto: to the minimum of the held-out loss", updates_or_auto),
    "policy_steps": (140, "updates of the policy, few, so that RL has something left to explore; or auto",
                     updates_or_auto),
    "targets": ("", "layers that get LoRA, by their last names, such as q_proj,v_proj; all linear ones if none"),
    "lr": (4e-3, "peak learning rate; the paper's is 2e-4, for a large model", 0.0),
    "batch": (16, "examples in an update", 1),
    "rank": (16, "LoRA rank, the paper's", 1),
    "alpha": (8.0, "LoRA alpha, the paper's", 0.0),
}
CLIP_NORM = 1.0  # largest norm of a gradient
HELD_OUT = 128  # records of the valid split that are looked at, every REPORT_EVERY updates
REPORT_EVERY = 100
MOST_UPDATES = 5000  # of a stage that stops by itself
LOOK_EVERY = 25  # auto: updates between two looks at the held-out loss
PATIENCE = 200  # auto: it stops after so many updates without a new minimum
LEAST_GAIN = 1e-4  # nats by which a new minimum is lower: a loss that has reached 0 falls for ever


# ---------------------------------------------------------------------------------------------------------
# Examples: records -> (prompt ids, completion ids)


def examples_of(records, stage, players):
    """What a stage is trained on, in the order of the records."""
    if stage == "reflect":
        return reflect_examples(records, players.tokenizer)
    pairs = []
    for step, record in zip(steps_of(records, stage, players), records, strict=True):
        pairs.append((step.ids, [step.label_ids[record.action]]))  # the label is one token
    return pairs


def steps_of(records, stage, players):
    """The policy's decisions at the records, with the teacher's reflections or with none."""
    states = [record.state for record in records]
    menus = [record.actions for record in records]
    reflections = [record.reflection if stage == "policy" else None for record in records]
    return players.steps(states, menus, reflections)


def reflect_examples(records, tokenizer):
    """State -> reflection and EOS, so that the reflector learns to stop."""
    prompts = [reflector_prompt(record.state) for record in records]
    alone = encode_all(tokenizer, prompts)
    both = encode_all(tokenizer, [prompt + record.reflection for prompt, record in zip(prompts, records, strict=True)])
    pairs = []
    for prompt, whole, record in zip(alone, both, records, strict=True):
        completion = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:  # the two merged at the seam: the tokens of the reflection by itself
            [completion] = encode_all(tokenizer, [record.reflection], bos=False)
        pairs.append((prompt, [*completion, tokenizer.eos_token_id]))
    return pairs


def check_lengths(pairs, records, stage, players):
    """A `UserError` where an example, or a reflection as long as it may be, does not fit the model's context."""
    written = encode_all(players.tokenizer, [record.reflection for record in records])  # by the teacher
    longest = 0
    for (prompt, completion), reflection in zip(pairs, written, strict=True):
        # Tokens by which the reflector may write more than the teacher.
        room = max(0, players.max_reflection - len(reflection)) if stage != "plain" else 0
        longest = max(longest, len(prompt) + len(completion) + room)
    if longest > players.context:
        raise UserError(
            f"stage {stage}: a text of {longest} tokens (with --max-reflection {players.max_reflection}) exceeds the "
            f"model's context of {players.context}"
        )


def collate(pairs, device="cpu"):
    """(prompt, completion) ids -> ids (B, T), right-padded, and a mask of the completions' tokens (B, T)."""
    ids = right_pad([[*prompt, *completion] for prompt, completion in pairs], device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        mask[row, len(prompt) : len(prompt) + len(completion)] = True
    return ids, mask


# ---------------------------------------------------------------------------------------------------------
# Loss


def completion_loss(model, ids, mask):
    """Mean negative log-likelihood of the masked tokens, a scalar in nats, by the model's own forward.

    Logits are made only at positions before a token that counts.
    """
    counts = mask[:, 1:]  # (B, T-1): whether position t predicts a token that counts
    if not counts.any():
        raise ValueError("no completion token in this batch: the loss would be 0 or NaN")
    rows, places = counts.nonzero(as_tuple=True)  # (N,)
    logits = forward(model, ids, rows, places).logits  # (N, V)
    return F.cross_entropy(logits.float(), ids[rows, places + 1])


def loss_of(pairs, players, backward=False):
    """The mean `completion_loss` of some pairs, a float, in micro-batches of about one length; `backward` adds its
    gradient."""
    total, tokens = 0.0, sum(len(completion) for _, completion in pairs)
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(pairs), players.micro_batch):
        ids, mask = collate(pairs[start : start + players.micro_batch], players.device)
        with players.autocast():
            loss = completion_loss(players.model, ids, mask) * (mask.sum() / tokens)
        if backward:
            loss.backward()
        total += loss.item()
    return total


# ---------------------------------------------------------------------------------------------------------
# The loop


def lr_at(step, steps, peak):
    """A linear warm-up, then a cosine down to a tenth."""
    warm_up = min(20, steps // 4)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@functools.lru_cache(2)
def permutation(seed, epoch, n):
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def batch_at(pairs, step, args):
    """The pairs of an update: a function of the step alone, so that a resumed run sees the same ones."""
    batch = []
    for i in range(step * args.batch, (step + 1) * args.batch):
        epoch, index = divmod(i, len(pairs))
        batch.append(pairs[permutation(args.seed, epoch, len(pairs))[index]])
    return batch


def fit(run, players, stage, pairs, records, steps, args, schedule=None):
    """Minimise the loss of `pairs` for `steps` updates, or go on from the run's checkpoint.

    The learning rate falls over `schedule` updates: over `steps`, or with "auto" over MOST_UPDATES, if none is given.

    Some held-out `records` are looked at now and then. `steps="auto"` stops when their loss has not fallen for a while,
    and goes back to its minimum: so that runs with and without reflection, which learn at different speed, can be
    compared. Returns the number of updates that made the weights.
    """
    parameters = adapter_parameters(players.model, stage)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    done, saved = run.restore(parameters, optimizer)
    best = saved.get("best", {"loss": math.inf, "step": 0, "weights": []})
    longest = max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    texts = min(args.batch, players.micro_batch, len(pairs))
    use_adapter(players.model, stage)
    checks.say_memory(stage, players.device, parameters, texts, len(longest[0]) + len(longest[1]),
                      lambda n: loss_of([longest] * n, players, backward=True))
    auto = steps == "auto"
    last = MOST_UPDATES if auto else steps
    for step in tqdm(range(done, last), initial=done, total=last, desc=stage, unit="update", disable=None):
        if auto and step - best["step"] >= PATIENCE:
            break
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, schedule or last, args.lr)
        use_adapter(players.model, stage)
        loss = loss_of(batch_at(pairs, step, args), players, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM).item()
        if not math.isfinite(norm):
            raise UserError(f"update {step + 1}: the gradient is not finite; try a smaller --lr, or --dtype fp32")
        optimizer.step()
        optimizer.zero_grad()
        figures = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr}
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == last:
            figures |= held_out(players, records, stage)
            tqdm.write(
                f"{stage:8} update {step + 1:4}: held-out loss {figures['valid_loss']:.3f} nats, "
                f"{figures['valid_exact']:.0%} just as the teacher"
            )
        elif auto and (step + 1) % LOOK_EVERY == 0:
            figures["valid_loss"] = held_out_loss(players, records, stage)
        # The weights of the minimum are in the checkpoint as well: a resumed run may have passed it.
        if auto and figures.get("valid_loss", math.inf) < best["loss"] - LEAST_GAIN:
            weights = [parameter.detach().cpu().clone() for parameter in parameters]
            best = {"loss": figures["valid_loss"], "step": step + 1, "weights": weights}
        run.log(figures)
        run.save(step + 1, parameters, optimizer, best=best)
    if not auto:
        return steps
    print(f"{stage}: held-out loss {best['loss']:.3f} nats after {best['step']} updates, its minimum")
    with torch.no_grad():
        for parameter, weights in zip(parameters, best["weights"], strict=True):
            parameter.copy_(weights)
    return best["step"]


@torch.no_grad()
def held_out_loss(players, records, stage):
    """The loss of held-out records in nats a token."""
    use_adapter(players.model, stage)
    return loss_of(examples_of(records, stage, players), players)


@torch.no_grad()
def held_out(players, records, stage):
    """Loss of held-out records, and how often the greedy output is the teacher's."""
    figures, right = {"valid_loss": held_out_loss(players, records, stage)}, 0
    if stage == "reflect":
        players.reflections.clear()  # the reflector has changed
        for written, record in zip(players.reflect([record.state for record in records]), records, strict=True):
            right += written == record.reflection
    else:
        steps = steps_of(records, stage, players)
        players.score(steps, adapter=stage)
        for step, record in zip(steps, records, strict=True):
            right += step.log_probs.index(max(step.log_probs)) == record.action
    return figures | {"valid_exact": right / len(records)}


def sft_args(args):
    """The settings that this stage depends on, and no others: RL runs that share them share the adapters."""
    tables = COMMON | DATA_OPTIONS | OPTIONS
    return argparse.Namespace(**{key: value for key, value in vars(args).items() if key in tables})


def folder_of(args):
    """Where the adapters of these settings live: `runs/taxi-sft-s0-3f9c12`; other settings have another folder."""
    settings = settings_of(sft_args(args)) | {"seed": None}  # it stands in the name: seeds of one kind share the rest
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return Path(args.runs) / f"{short_name(args.env)}-sft-s{args.seed}-{digest}"


def adapters(args):
    """`{name: folder}` of the adapters that an RL run of these settings starts from."""
    folder, found = folder_of(args), {}
    if args.reflection:
        found["reflect"] = folder / "reflect"
    if args.sft:
        found["policy"] = folder / ("policy" if args.reflection else "plain")
    return found


def run(args, stages, schedule=None):
    """Teacher records, then the stages; what is finished is kept. Each stage leaves an adapter in PEFT's format.

    `schedule`: see `fit`. It is no part of the folder's name: with another one use other `args.runs`.
    """
    folder, make_env = folder_of(args), env_factory(args)
    todo = [stage for stage in stages if not (folder / stage / "adapter_config.json").is_file()]
    if not todo:
        return print(f"{folder}: done already")
    # What cannot work leaves no folder behind: the environment, the base and one's own records come first.
    checks.check_own(make_env(), args)
    players = load_players(args, {})
    for stage in todo:
        torch.manual_seed(args.seed)
        add_adapter(players.model, stage, args.rank, args.alpha, args.targets.split(",") if args.targets else None)
    own = negatives.hold_out(negatives.read_records(args.data)) if args.data else None

    whole = Run(folder, sft_args(args), resume=True, wait=True)
    data = own or negatives.teacher_data(folder / "data", make_env, args)
    print(f"{folder}: {len(data['train'])} records to learn from, {len(data['valid'])} held out")
    sample = random.Random(0).sample(data["valid"], min(len(data["valid"]), HELD_OUT))
    pairs = {}
    for stage in todo:
        pairs[stage] = examples_of(data["train"], stage, players)
        # Of all stages, before the first is trained; also what will be looked at later.
        check_lengths(pairs[stage], data["train"], stage, players)
        check_lengths(examples_of(sample, stage, players), sample, stage, players)
    for stage in todo:
        stage_run = Run(folder / stage, sft_args(args), resume=True)
        steps = args.reflect_steps if stage == "reflect" else args.policy_steps
        updates = fit(stage_run, players, stage, pairs[stage], sample, steps, args, schedule)
        write_budget(folder / stage, len(pairs[stage]), updates)
        save_adapter(players.model, stage, folder / stage)
        stage_run.lock.release()
    whole.lock.release()


def main():
    parser = argparse.ArgumentParser(description="Supervised fine-tuning of reflector and policy.")
    stage = {"stage": ("", "reflect, policy or plain (default: reflect, then policy)", ("reflect", "policy", "plain"))}
    add_options(parser, COMMON, DATA_OPTIONS, OPTIONS, stage)
    args = parse_args(parser)
    run(args, [args.stage] if args.stage else ["reflect", "policy"])


if __name__ == "__main__":
    envs.run_main(main)
