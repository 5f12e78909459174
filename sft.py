"""The supervised stage: base LM, reflector, policy. One loop; data, mask and weights differ.

    stage     text                                               loss on                trains
    base      random play and plain facts, by `negatives.py`     what follows the state the whole LM
    reflect   state -> reflection                                reflection and EOS     LoRA "reflect"
    policy    state, reflection, actions -> label                the label, one token   LoRA "policy"
    plain     state, actions -> label (the ablation)             the label, one token   LoRA "policy"

Loss is the mean negative log-likelihood of the completion; masks are built from lengths, never from token ids, so the
EOS that ends a reflection is trained even where it is also the padding. Deviation: the paper's
reflections are GPT-4's; ours are written by the rule teachers of `negatives.py`.

    python sft.py --env taxi               # reflector, then policy
    python sft.py --stage base             # a base LM, from nothing
"""

import argparse
import collections
import dataclasses
import functools
import math
import random
import re
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import envs
import negatives
from envs import UserError
from reflect_rl import (
    ACTION_HEADER,
    LABELS,
    Labels,
    Players,
    adapter_parameters,
    add_adapter,
    add_common_options,
    encode,
    env_factory,
    from_first,
    join_processes,
    load_base,
    lock_run,
    log_line,
    open_run,
    parse_args,
    rank,
    save_adapter,
    save_checkpoint,
    short_name,
    sum_gradients,
    summed,
    use_adapter,
    world,
)

# ---------------------------------------------------------------------------------------------------------
# Loss


def collate(pairs, device="cpu"):
    """Token-id pairs (prompt, completion) -> ids (B, T), right-padded, and a mask of completion tokens (B, T)."""
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids, mask = torch.zeros(len(pairs), longest, dtype=torch.long), torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, len(prompt) : end] = True
    return ids.to(device), mask.to(device)


def completion_loss(model, ids, mask):
    """Mean negative log-likelihood of the masked tokens, a scalar in nats; the head is applied only where it counts.

    Right padding needs no attention mask: a causal model never looks to the right of a real token.
    """
    if not mask[:, 1:].any():
        raise ValueError("no completion token in this batch: the loss would be 0 or NaN")
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, d); position t predicts t+1
    logits = model.get_output_embeddings()(hidden[mask[:, 1:]])  # (N, V), N completion tokens
    return F.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])


# ---------------------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass
class Schedule:
    """How long and how fast to train; lr warms up linearly, then falls to a tenth along a cosine."""

    steps: int
    batch: int
    lr: float
    warmup: int = 20
    clip: float = 1.0
    micro_batch: int = 0  # examples a forward pass, 0 = all; gradients are accumulated

    def lr_at(self, step):
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def accumulate(model, pairs, micro_batch, bf16):
    """Backward of the batch's `completion_loss`, `micro_batch` pairs at a time; the same gradient, less memory.

    Pairs of about one length go together, which needs little padding. Of several processes each takes its share.
    """
    total, tokens = 0.0, sum(len(completion) for _, completion in pairs)
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[rank() :: world()]
    for start in range(0, len(pairs), micro_batch or len(pairs)):
        ids, mask = collate(pairs[start : start + (micro_batch or len(pairs))], model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = completion_loss(model, ids, mask) * (mask.sum() / tokens)
        loss.backward()
        total += loss.item()
    return summed(collections.Counter(loss=total))["loss"]


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))


def training_state(step, losses, parameters, optimizers):
    """What `restore` needs to go on behind update `step`."""
    return {
        "step": step,
        "losses": losses[-20:],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "parameters": [parameter.detach().cpu() for parameter in parameters],
    }


def restore(checkpoint, parameters, optimizers):
    """Put a checkpoint's weights and optimizer state in place; returns `(step, last losses)`."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    return state["step"], state["losses"]


def fit(
    model,
    parameters,
    batch_at,
    schedule,
    run,
    write,
    bf16=False,
    resume_from=None,
    save_every=200,
    report=None,
    optimizers=None,
):
    """Minimise `completion_loss` for `schedule.steps` updates; the mean of the last 20 losses.

    `batch_at(step)` gives the token-id pairs of an update as a function of the step alone, so a resumed run sees what
    the uninterrupted one saw. `write(folder)` puts the weights into a checkpoint, `report()` held-out figures.
    `optimizers` (default: AdamW on all parameters) keep the proportions of their learning rates.
    """
    parameters = list(parameters)
    optimizers = optimizers or [adamw(parameters, schedule.lr)]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start, losses = restore(resume_from, parameters, optimizers) if resume_from else (0, [])

    def save(folder):
        write(folder)
        torch.save(training_state(step + 1, losses, parameters, optimizers), folder / "state.pt")

    bar = tqdm(
        range(start, schedule.steps),
        initial=start,
        total=schedule.steps,
        desc=Path(run).name,
        unit="update",
        disable=None if rank() == 0 else True,
    )
    for step in bar:
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * schedule.lr_at(step) / schedule.lr
        loss = accumulate(model, batch_at(step), schedule.micro_batch, bf16)
        sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        if not torch.isfinite(norm):
            raise UserError(f"step {step}: the gradient is not finite; try a smaller --lr, or --bf16 off")
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
        last = step + 1 == schedule.steps
        if rank() == 0 and (last or (step + 1) % 20 == 0):
            held_out = report() if report and (last or (step + 1) % 100 == 0) else {}
            log_line(
                run,
                step=step + 1,
                loss=sum(losses[-20:]) / len(losses[-20:]),
                grad_norm=norm.item(),
                lr=schedule.lr_at(step),
                **held_out,
            )
        if rank() == 0 and (last or (step + 1) % save_every == 0):
            save_checkpoint(run, step + 1, save)
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


# ---------------------------------------------------------------------------------------------------------
# Reflector and policy


def tokenized(tokenizer, examples, stage):
    """Texts to token ids; a reflection carries its EOS, a label is a token by itself."""
    if stage == "reflect":
        return [
            (encode(tokenizer, prompt), [*encode_more(tokenizer, prompt, text), tokenizer.eos_token_id])
            for prompt, text in examples
        ]
    return [(encode(tokenizer, prompt), encode_more(tokenizer, prompt, label)) for prompt, label in examples]


def encode_more(tokenizer, prompt, text):
    """Token ids of `text` behind `prompt`; where the two would merge, the tokens of `text` alone."""
    before, both = encode(tokenizer, prompt), encode(tokenizer, prompt + text)
    return (
        both[len(before) :] if both[: len(before)] == before else tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def shuffled_batches(pairs, size, seed):
    """`batch_at(step)` over endless epochs, each a permutation of its own."""
    order = functools.lru_cache(2)(lambda epoch: random.Random(f"{seed}/{epoch}").sample(range(len(pairs)), len(pairs)))

    def batch_at(step):
        positions = (divmod(i, len(pairs)) for i in range(step * size, (step + 1) * size))
        return [pairs[order(epoch)[index]] for epoch, index in positions]

    return batch_at


@torch.no_grad()
def held_out(players, records, stage):
    """Held-out loss, and how often the greedy output equals the teacher's: `{"valid_loss", "valid_exact"}`."""
    model, tokenizer = players.model, players.tokenizer
    use_adapter(model, "reflect" if stage == "reflect" else "policy")
    pairs = tokenized(tokenizer, negatives.sft_examples(records, stage, players.labels), stage)
    ids, mask = collate(pairs, model.device)
    with players.autocast():
        loss = completion_loss(model, ids, mask).item()
    if stage == "reflect":
        players.clear_memo()
        exact = [
            written == record.reflection
            for written, record in zip(players.reflect([r.state for r in records]), records, strict=True)
        ]
    else:
        prompts = [players.prompt(r.state, r.reflection if stage == "policy" else None, r.actions) for r in records]
        best = players.log_probs(prompts, [players.label_ids(r.actions) for r in records]).argmax(-1).tolist()
        exact = [choice == record.action for choice, record in zip(best, records, strict=True)]
    use_adapter(model, "reflect" if stage == "reflect" else "policy")
    return {"valid_loss": loss, "valid_exact": sum(exact) / len(exact)}


def check_lengths(pairs, players, stage):
    """A `UserError` where a `(prompt ids, completion ids)` has more tokens than the model's context."""
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    if longest > players.context:
        raise UserError(
            f"stage {stage}: an example of {longest} tokens exceeds the model's context of {players.context}"
        )


def train_stage(stage, args, folder, records, valid, resume=True, later=()):
    """Train one adapter on teacher records and write it to `folder` (PEFT's format); does nothing where it is done.

    `later` names the stages still to come: what they cannot be trained on is said before this one is trained.
    """
    if (folder / "adapter_config.json").is_file():
        return print(f"{folder}: done already")
    name = "reflect" if stage == "reflect" else "policy"
    schedule = Schedule(
        args.reflect_steps if stage == "reflect" else args.policy_steps,
        args.batch,
        args.lr,
        micro_batch=args.micro_batch,
    )
    config = {
        "stage": stage,
        "env": args.env,
        "base": args.base,
        "seed": args.seed,
        "rank": args.rank,
        "alpha": args.alpha,
        "labels": args.labels,
        "records": len(records),
        **dataclasses.asdict(schedule),
    }
    resume_from = open_run(folder, config, resume)
    model, tokenizer = load_base(args.base, args.device)
    torch.manual_seed(args.seed)
    add_adapter(model, name, args.rank, args.alpha)
    use_adapter(model, name)
    players = Players(model, tokenizer, bf16=args.bf16, max_reflection=args.max_reflection, labels=args.labels)
    for actions in {tuple(record.actions) for record in records}:
        players.label_ids(actions)  # too few labels: better said before any training
    for coming in later:  # the most characters stand for the most tokens; each stage counts all of its own
        texts = sorted(negatives.sft_examples(records, coming, players.labels), key=lambda e: -len("".join(e)))
        check_lengths(tokenized(tokenizer, texts[:64], coming), players, coming)
    pairs = tokenized(tokenizer, negatives.sft_examples(records, stage, players.labels), stage)
    check_lengths(pairs, players, stage)
    sample = random.Random(0).sample(valid, min(len(valid), 128))
    fit(
        model,
        adapter_parameters(model, name),
        shuffled_batches(pairs, args.batch, args.seed),
        schedule,
        folder,
        write=lambda path: save_adapter(model, name, path),
        bf16=args.bf16,
        resume_from=resume_from,
        report=lambda: held_out(players, sample, stage),
    )
    save_adapter(model, name, folder)


def sft_folder(args):
    """Where the SFT of these options lives: `runs/taxi-sft-s0`, `runs/taxi-sft-no-negatives-s0`."""
    return Path(args.runs) / f"{short_name(args.env)}-sft{'' if args.negatives else '-no-negatives'}-s{args.seed}"


def teacher_data(folder, make_env, args):
    """The teacher's records of the train and valid splits, written where they are not there yet."""
    data = {}
    for split, count in (("train", args.trajectories), ("valid", max(10, args.trajectories // 5))):
        path = folder / "data" / f"{split}.jsonl"
        if not path.exists():
            negatives.write_records(negatives.make_records(make_env, count, args.negatives, args.seed, split), path)
        data[split] = negatives.read_records(path)
    return data


def sft_run(args, stages):
    """Write the teacher data (where it is not there yet), or read `--data`, then train the stages on it; returns the
    run's folder."""
    negatives.check_data_options(args)
    folder, make_env = sft_folder(args), env_factory(args)
    keys = (
        "env",
        "env_option",
        "base",
        "seed",
        "trajectories",
        "negatives",
        "rank",
        "alpha",
        "batch",
        "lr",
        "reflect_steps",
        "policy_steps",
        "labels",
        "data",
    )
    if not (folder / "config.json").exists():  # what cannot work leaves nothing behind
        make_env()
        load_base(args.base)
    with lock_run(folder, wait=True):
        open_run(folder, {key: getattr(args, key) for key in keys}, resume=True)
        if args.data:
            data, source = negatives.hold_out(negatives.read_records(args.data)), args.data
        else:
            data, source = teacher_data(folder, make_env, args), f"{args.trajectories} trajectories"
            source += f", {args.negatives:.0%} perturbed"
        print(f"{folder}: {len(data['train'])} steps of {source}")
        for i, stage in enumerate(stages):
            train_stage(stage, args, folder / stage, data["train"], data["valid"], later=stages[i + 1 :])
    return folder


# ---------------------------------------------------------------------------------------------------------
# Base LM

MUON_TO_ADAMW = 0.3  # learning rate of AdamW's parameters, as a share of Muon's


JOINED = "\u2040"  # a tie; "a/b" is read as "a", "/\u2040", " b": it says that no space followed


def train_tokenizer(texts, size, numbered=()):
    """Byte-level BPE in which every digit (with the space before it) and every punctuation mark is a token of its own,
    so that a grid cell never merges with its neighbours. Things that go by a number (`numbered`: `cabinet 3`) keep it:
    they are names. The end-of-text token is id 0; it is also the padding (masks never look at ids).

    A word has the same tokens behind a space, a new line and an ASCII mark: `oven` of "an oven", "/oven", "my_oven".
    Else it could not be found by comparing tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    marks = [(re.escape(mark), mark + JOINED) for mark in string.punctuation + string.digits]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(rf"{old}(?=\p{{L}})"), f"{new} ") for old, new in [(r"\n", "\n"), *marks]]
    )
    names = rf" ?(?:{'|'.join(numbered)}) \p{{N}}{{1,2}}(?!\p{{N}})|" if numbered else ""
    words = rf" ?\p{{L}}+| ?\p{{N}}{JOINED}?|[^\s\p{{L}}\p{{N}}]{JOINED}?|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(names + words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(f"{JOINED} ", ""), decoders.Replace(Regex(r"\n (?=\p{L})"), "\n")]
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )


def base_corpus(labels, seed, numbers):
    """The documents of a corpus with these numbers, a function of its arguments alone; the environments take turns.
    `labels`: `{environment: Labels}`."""
    names = [name for name in labels for _ in range(getattr(envs.env_class(name), "turns", 1))]
    return [
        negatives.corpus_document(
            functools.partial(envs.make, name := names[i % len(names)]), random.Random(f"{seed}/{i}"), labels[name]
        )
        for i in numbers
    ]


def copying_exercise(rng, vocabulary):
    """Random tokens, to be said again. It teaches to copy, and gives every token of the vocabulary an embedding of its
    own: those that play never shows would else collapse into one, and a frozen base could not tell them apart."""
    tokens = [rng.randrange(vocabulary) for _ in range(rng.randrange(4, 24))]
    return tokens, tokens


def new_base(vocabulary, width, layers):
    """A small Llama, with heads of 32 dimensions. Its positions are relative (rotary): what it learns at one place of a
    text it knows at all. A GPT-2 that had learned to find a menu's labels at position 0 (89%) was at a guess at 400."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,  # three matrices: about as many weights as GPT-2's two of 4 * width
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow: within 300 tokens few pairs turn round
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return initialised(LlamaForCausalLM(config))


@torch.no_grad()
def initialised(model):
    """Larger embeddings, and two heads of the first block that look a fixed way back, by their biases alone.

    Copying means to find where the present token occurred and to go on as it went on there (an induction head, Olsson
    et al. 2022). It needs, in a layer below, a head that says what came before: the first. The second gathers the last
    four tokens. After 120 updates of copying the loss was 0.9 nats with both, 5.1 with the first alone, which had 0.7
    after 150; with neither it then was 5.2 (one seed each). All reading of names waits for copying.
    """
    model.model.embed_tokens.weight.mul_(4)
    attention, frequency = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    half = len(frequency)  # rotary pairs of a head: (i, half + i), turned by position * frequency[i]
    looks = ((1, 0, 6.0), (1.5, 1, 4.5))  # how far back, first rotary pair, gain: sharp, and a window
    for head, (back, first, gain) in enumerate(looks[: model.config.num_attention_heads]):
        rows, some = slice(2 * half * head, 2 * half * (head + 1)), slice(first, half // 2)
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 0, 0
        query, key, angle = attention.q_proj.bias[rows], attention.k_proj.bias[rows], back * frequency[some]
        key[:half][some] = gain
        query[:half][some], query[half:][some] = gain * angle.cos(), -gain * angle.sin()  # the key, turned back
    return model


def base_optimizers(model, lr):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest.

    A GPT-2 shape had the loss of 150 updates of AdamW after 100 (one seed).
    """
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=0.95), adamw(rest, MUON_TO_ADAMW * lr)]


@torch.no_grad()
def reading_accuracy(model, tokenizer, name, states=200, seed=1):
    """How well the LM can read an environment: `{beginning of a fact: (finished right, asked)}` on random-play states.

    A fact counts when every token of its rest is the most probable one given the true ones before it. Beginnings that
    differ in names with numbers, dots or slashes only are one: `On ... there is`.
    """
    env, rng, right = envs.make(name), random.Random(f"read/{seed}"), {}
    for _ in range(states):
        state, _ = negatives.random_walk(env, rng, rng.randrange(20))
        facts = env.describe()
        pairs = [
            (
                encode(tokenizer, f"{state}\n{negatives.FACTS_HEADER}{beginning}"),
                encode_more(tokenizer, f"{state}\n{negatives.FACTS_HEADER}{beginning}", rest),
            )
            for beginning, rest in facts
        ]
        ids, mask = collate(pairs, model.device)
        best = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
        exact = ((best == ids[:, 1:]) | ~mask[:, 1:]).all(1).tolist()
        for (beginning, _), ok in zip(facts, exact, strict=True):
            kind = re.sub(r"^\S+(?= is in$)|[a-z]+ \d+|\S+[./]\S*", "...", beginning)
            before = right.get(kind, (0, 0))
            right[kind] = (before[0] + ok, before[1] + 1)
    return right


@torch.no_grad()
def label_accuracy(model, tokenizer, documents):
    """How often the LM finds the label of the action that a document names in full: `(right, asked)`."""
    asked = []
    for document in documents:
        before, _, after = document.rpartition(ACTION_HEADER)
        label = after.partition("\n")[0]
        menu = reversed(before.splitlines())
        action = next(line for line in menu if line.startswith(f"{label} ")).removeprefix(f"{label} ")
        if f"Now: {action}." in before:
            prompt = encode(tokenizer, before + ACTION_HEADER)
            asked.append((prompt, encode_more(tokenizer, before + ACTION_HEADER, label)))
    ids, mask = collate(asked, model.device)
    best = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    return ((best == ids[:, 1:]) & mask[:, 1:]).sum().item(), len(asked)


def base_tokenizer(names, args, folder):
    """Train the tokenizer, once: a resumed run must not number its tokens anew. Returns the folder that holds it."""
    if not (folder / "tokenizer.json").exists():
        letters = dict.fromkeys(names, lambda actions: (LABELS, None))
        sample = base_corpus(letters, f"tokenizer/{args.seed}", range(3000))
        # every label, and the words that an environment names, one token each behind a space or a new line
        words = [word for name in names for word in getattr(envs.env_class(name), "words", tuple)()]
        sample += ["".join(f" {word}" for word in (*LABELS, *words))] * 100
        # the tokenizer, and it alone, also sees teacher reflections: it should spell them in few tokens
        for name in names:
            records = negatives.make_records(functools.partial(envs.make, name), 30, 0.5, args.seed)
            sample += [record.reflection for record in records]
        numbered = [thing for name in names for thing in getattr(envs.env_class(name), "numbered", tuple)()]
        train_tokenizer(sample, args.vocabulary, numbered).save_pretrained(folder)
    return folder


class BaseCorpus:
    """What the base LM learns from: first to copy random tokens, then to read, with a little copying to the end."""

    def __init__(self, names, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        kinds = {name: getattr(envs.env_class(name), "settings", {}).get("labels", "letters") for name in names}
        self.labels = {name: Labels(tokenizer, kind) for name, kind in kinds.items()}

    def documents(self, seed, numbers):
        """Token-id pairs (state, the rest). States are read only: their names and numbers are random, and most of the
        time goes into the head."""
        parts = (text.partition(negatives.FACTS_HEADER) for text in base_corpus(self.labels, seed, numbers))
        pairs = tokenized(self.tokenizer, [(state + header, rest) for state, header, rest in parts], "base")
        return [(prompt, [*rest, self.tokenizer.eos_token_id]) for prompt, rest in pairs]

    def batch_at(self, step):
        """The token-id pairs of an update."""
        seed, size, reading = self.args.seed, self.args.base_batch, step >= self.args.copy_steps
        rng = random.Random(f"{seed}/exercises/{step}")
        pairs = [copying_exercise(rng, len(self.tokenizer)) for _ in range(size // 2 if reading else 4 * size)]
        return pairs + (self.documents(seed, range(step * size, (step + 1) * size)) if reading else [])


def train_base(args):
    """Make a base LM: tokenizer and weights from nothing, on text of random play (no expert, no reflection)."""
    names, out = args.corpus_envs.split(","), Path(args.out)
    if args.width < 32 or args.width % 32:
        raise UserError(f"--width must be a multiple of 32, the size of a head, not {args.width}")
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already: give another --out")
    run = Path(args.runs) / f"base-s{args.seed}"
    schedule = Schedule(args.base_steps, args.base_batch, args.base_lr, warmup=50, micro_batch=4)
    keys = (
        "corpus_envs",
        "seed",
        "vocabulary",
        "width",
        "layers",
        "copy_steps",
    )
    config = {key: getattr(args, key) for key in keys} | dataclasses.asdict(schedule)
    resume_from = from_first(lambda: open_run(run, config, resume=True))
    tokenizer = AutoTokenizer.from_pretrained(from_first(lambda: base_tokenizer(names, args, run / "tokenizer")))
    torch.manual_seed(args.seed)
    model = new_base(len(tokenizer), args.width, args.layers)
    model.to(args.device)

    corpus = BaseCorpus(names, args, tokenizer)

    def report():
        ids, mask = collate(corpus.documents(f"valid/{args.seed}", range(60)), model.device)
        with torch.no_grad():
            figures = {"valid_loss": completion_loss(model, ids, mask).item()}
        for name in names:
            right, asked = label_accuracy(
                model, tokenizer, base_corpus({name: corpus.labels[name]}, "labels/0", range(60))
            )
            figures[f"labels_{name}"] = right / asked
        return figures

    fit(
        model,
        model.parameters(),
        corpus.batch_at,
        schedule,
        run,
        write=lambda folder: None,
        bf16=args.bf16,
        resume_from=resume_from,
        report=report,
        optimizers=base_optimizers(model, schedule.lr),
    )
    if rank():
        return
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(
        f"{out}: {model.num_parameters():,} parameters, {schedule.steps * schedule.batch:,} documents, "
        f"held-out loss {report()['valid_loss']:.4f}"
    )
    for name in names:
        documents = base_corpus({name: corpus.labels[name]}, f"labels/{args.seed}", range(200))
        right, asked = label_accuracy(model, tokenizer, documents)
        print(f"{name}: finds the label of a named action {right / asked:.1%} of {asked} times; finishes facts")
        found = reading_accuracy(model, tokenizer, name)
        for kind, (right, asked) in sorted(found.items(), key=lambda item: -item[1][1])[:16]:
            print(f"  {kind:40} {right / asked:6.1%} of {asked}")


# ---------------------------------------------------------------------------------------------------------


def add_sft_options(parser):
    negatives.add_data_options(parser)
    group = parser.add_argument_group("supervised stage")
    group.add_argument(
        "--data",
        help="train on this JSONL file instead of the teacher's (see negatives.py); every sixth trajectory is held out",
    )
    group.add_argument("--reflect-steps", type=int, default=400, help="updates of the reflector (default: 400)")
    group.add_argument(
        "--policy-steps",
        type=int,
        default=140,
        help="updates of the policy; few, so that RL has entropy left (default: 140)",
    )
    group.add_argument("--batch", type=int, default=16, help="examples an update (default: 16)")
    group.add_argument(
        "--lr", type=float, default=4e-3, help="SFT learning rate (default: 4e-3; the paper's 2e-4 for large models)"
    )
    group.add_argument("--rank", type=int, default=16, help="LoRA rank (default: 16, the paper's)")
    group.add_argument("--alpha", type=float, default=8, help="LoRA alpha (default: 8, the paper's)")
    group.add_argument("--max-reflection", type=int, default=96, help="token limit of a reflection (default: 96)")


def main():
    parser = argparse.ArgumentParser(description="Supervised fine-tuning of reflector and policy.", allow_abbrev=False)
    add_common_options(parser)
    add_sft_options(parser)
    parser.add_argument(
        "--stage", choices=("base", "reflect", "policy", "plain"), help="one stage only (default: reflect, then policy)"
    )
    group = parser.add_argument_group("base LM (--stage base)")
    group.add_argument("--out", default="models/new", help="where the new base LM goes (default: models/new)")
    group.add_argument(
        "--corpus-envs",
        default="taxi,autoexplore,alfworld",
        help="environments whose random play is the corpus (default: all three)",
    )
    group.add_argument("--vocabulary", type=int, default=5120, help="most tokens (default: 5120)")
    group.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 32 (default: 128)")
    group.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    group.add_argument("--copy-steps", type=int, default=150, help="updates that only copy, at first (default: 150)")
    group.add_argument("--base-steps", type=int, default=6000, help="updates (default: 6000)")
    group.add_argument("--base-batch", type=int, default=16, help="documents an update (default: 16)")
    group.add_argument("--base-lr", type=float, default=0.02, help="peak learning rate of Muon (default: 0.02)")
    args = parse_args(parser)
    if args.stage == "base":
        join_processes(args)
        train_base(args)
    else:
        sft_run(args, [args.stage] if args.stage else ["reflect", "policy"])


if __name__ == "__main__":
    envs.run_main(main)
