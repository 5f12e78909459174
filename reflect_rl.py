"""The two players: prompts, one-token actions, LoRA by hand, play.

One frozen language model carries two LoRA adapters. The reflector ("reflect") reads a state and writes a short
reflection. The policy ("policy") reads state, reflection and the enumerated actions, and answers with ONE token, the
label of an action. Nothing is trained here: `sft.py` and `rl.py` train.

    in the code     paper     meaning
    state           s         text of the environment
    reflection      a_1       what player 1, the reflector R_phi, writes
    actions         A(s)      valid actions of this state; the policy's distribution is over these and nothing else
    label           a_2       one-token name of an action; what player 2, the policy pi_theta, answers
    log_prob                  log pi_theta(a_2 | s, a_1)

Deviations: the paper's players are two copies of one pretrained LM, ours share one frozen copy. The paper numbers its
actions; we use letters, or words of the actions.

    python reflect_rl.py --env taxi             # play one episode; show every state, reflection and probability
    python reflect_rl.py --env taxi --watch     # the same, animated
"""

import argparse
import collections
import dataclasses
import functools
import inspect
import math
import os
import random
import re
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import envs
from envs import UserError
from plumbing.options import COMMON, add_options, env_factory, parse_args
from plumbing.runs import adapters_of, as_trained, runs_of
from plumbing.show import show, watch
from plumbing.weights import plain_layers, read_adapter, read_base, write_adapter

NANO = Path(__file__).parent / "models" / "nano"

# ---------------------------------------------------------------------------------------------------------
# Prompts: one builder for SFT, RL and evaluation

ACTION_HEADER = "# Action:\n"


def one_line(text):
    """The normal form of a reflection: one line, single spaces."""
    return " ".join(text.split())


def quote(text):
    """Text from outside, in which no line can pass for a header of ours."""
    return re.sub(r"(?m)^# (?=(Analyze|Actions?):)", "#", text)


def reflector_prompt(state):
    return f"{quote(state)}\n# Analyze:\n"


def policy_prompt(state, reflection, actions, labels):
    """Prompt of the policy; `reflection=None` is the paper's ablation without a reflector."""
    text = quote(state) if reflection is None else reflector_prompt(state) + quote(one_line(reflection))
    text += "\n# Actions:\n"
    for label, action in zip(labels, actions, strict=False):
        text += label + " " + action.replace("\n", " ") + "\n"
    return text + ACTION_HEADER


def encode_all(tokenizer, texts, bos=True):
    """Token ids of each text: with the tokenizer's BOS if it has that habit, never with a closing EOS.

    A text comes from outside: what looks like a special token in it is spelt out, it never becomes one.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=bos, split_special_tokens=True)["input_ids"]
    for row in rows:
        if row and row[-1] == tokenizer.eos_token_id:
            row.pop()  # a prompt goes on
    return rows


def encode(tokenizer, text):
    return encode_all(tokenizer, [text])[0]


# ---------------------------------------------------------------------------------------------------------
# Labels: one-token names of actions

LABELS = string.ascii_uppercase + string.ascii_lowercase + string.digits  # the labels to try first
MOST_LABELS = 128


class Labels:
    """Names the actions of a menu by one token each: `labels(actions)` gives `(labels, token ids)`, all distinct.

    `letters`: A, B, C, ... in the menu's order. `words`: a token of the action's own text, the one that the fewest
    actions of the menu share (`cat price list.md` -> ` price`), or a letter where all are taken. To answer with a
    letter means to look it up in the menu, which the nano base LM cannot do where the menu changes; a word needs no
    more than to be copied. Where the tokenizer has too few labels, a `UserError` names both counts.
    """

    def __init__(self, tokenizer, kind="letters"):
        if kind not in ("letters", "words"):  # an environment's settings do not pass through argparse
            raise UserError(f"no labels of the kind {kind!r}: letters or words")
        self.tokenizer, self.kind = tokenizer, kind
        self.end = encode(tokenizer, ACTION_HEADER)  # what every policy prompt ends with
        self.named = functools.lru_cache(100_000)(self.name)  # menus come back
        self.letters = {}  # token id -> label, for any menu
        short = sorted(filter(str.isalpha, tokenizer.get_vocab()), key=lambda word: (len(word), word))
        for label in [*LABELS, *filter(str.isascii, short)]:  # letters, digits, then short words
            token = self.one_token(label)
            if token is not None:
                self.letters.setdefault(token, label)
            if len(self.letters) == MOST_LABELS:
                break

    def one_token(self, text):
        """The id of the single token by which `text` continues the end of a prompt, or None.

        "10" is two tokens to a tokenizer that splits digits, and SentencePiece may put a space before a letter.
        """
        *before, token = encode(self.tokenizer, ACTION_HEADER + text)
        return token if before == self.end and token != self.tokenizer.unk_token_id else None

    def __call__(self, actions):
        return self.named(actions)

    def name(self, actions):
        if not actions:
            raise UserError("the environment gave a state without any action")
        chosen = self.words(actions) if self.kind == "words" else {}  # index -> (token id, label)
        free = dict(self.letters)
        for token, _ in chosen.values():
            free.pop(token, None)
        if len(free) < len(actions) - len(chosen):
            raise UserError(f"{len(actions)} actions, but there are only {len(self.letters)} one-token labels")
        letters = iter(free.items())  # they name what has no word, in the menu's order
        ids, labels = zip(*(chosen[i] if i in chosen else next(letters) for i in range(len(actions))), strict=True)
        return labels, ids

    def words(self, actions):
        """`{index of an action: (token id, text) of one of its words}`: the rarest of the menu, no token twice."""
        words, count = {}, collections.Counter()
        for action in actions:
            words[action] = self.words_of(action)
            count.update(set(words[action]))
        chosen, taken = {}, set()
        # In alphabetical order, so that the words do not depend on the menu's order.
        for i in sorted(range(len(actions)), key=actions.__getitem__):
            free = [word for word in words[actions[i]] if word not in taken]
            if free:
                chosen[i] = min(free, key=count.__getitem__)
                taken.add(chosen[i])
        return chosen

    def words_of(self, action):
        """`(token id, text)` of each token that may follow a prompt and is read in the action.

        The action is encoded behind a letter: in the middle of a line words begin with their space.
        """
        found = []
        for token in encode(self.tokenizer, f"A {action}")[len(encode(self.tokenizer, "A")) :]:
            text = self.tokenizer.decode([token])
            # SentencePiece drops a token's space when it decodes it alone: a second try with it.
            for spelling in (text, f" {text}"):
                if text.strip() and text.strip() in action and self.one_token(spelling) == token:
                    found.append((token, self.letters.get(token, spelling)))
                    break
        return found


# ---------------------------------------------------------------------------------------------------------
# LoRA: W x + (alpha / r) B A x, with W frozen (Hu et al. 2021)


class MergedProduct(torch.autograd.Function):
    """(W + B A) x: one large product instead of one large and two thin ones, with its gradient by hand.

    x (..., d_in), W (d_out, d_in) frozen, A (r, d_in) times alpha / r, B (d_out, r) -> (..., d_out). Autograd would
    first make a gradient of W's size. W + B A is made again for the gradient of x: kept, it would be a second W.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B):
        ctx.save_for_backward(x, W, A, B)
        return F.linear(x, torch.addmm(W, B, A), bias)

    @staticmethod
    def backward(ctx, dy):  # (..., d_out)
        x, W, A, B = ctx.saved_tensors
        dx = dy @ torch.addmm(W, B, A) if ctx.needs_input_grad[0] else None
        x, dy = x.flatten(0, -2), dy.flatten(0, -2)  # (N, d_in), (N, d_out)
        return dx, None, None, (dy @ B).T @ x, dy.T @ (x @ A.T)


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` or GPT-2 `Conv1D` with named low-rank updates, of which at most one is active."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale, self.active = {}, None

    @property
    def weight(self):
        return self.base.weight  # some blocks look at its type

    def add(self, name, r, alpha):
        # Conv1D keeps its weight transposed
        d_out, d_in = reversed(self.weight.shape) if isinstance(self.base, Conv1D) else self.weight.shape
        A = nn.init.kaiming_uniform_(torch.empty(r, d_in), a=math.sqrt(5))  # drawn on the CPU: the same for all devices
        self.lora_A[name] = nn.Parameter(A.to(self.weight.device))  # fp32, whatever the base has
        self.lora_B[name] = nn.Parameter(torch.zeros(d_out, r, device=self.weight.device))  # 0: no change at first
        self.scale[name] = alpha / r

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        if self.active is None:
            return self.base(x)
        # The scale goes on A, which is smaller than x. The weights are fp32, the product has x's type.
        A, B = (self.lora_A[self.active] * self.scale[self.active]).to(x.dtype), self.lora_B[self.active].to(x.dtype)
        if self.merges(x):
            W = self.weight.T if isinstance(self.base, Conv1D) else self.weight
            return MergedProduct.apply(x, W, self.base.bias, A, B)
        return self.base(x) + F.linear(F.linear(x, A), B)  # rank r in between: never a full-size matrix

    def merges(self, x):
        """Whether W + B A, made for this call only, is the faster way: with many tokens.

        Not in bf16, where a small B A would vanish in the rounding of W.
        """
        W, tokens = self.weight, x.numel() // x.shape[-1]
        exact = x.dtype == W.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        # r multiplications for each number that the thin products make, or for each of W + B A: the fewer numbers win.
        return exact and tokens * sum(W.shape) > W.numel()


def lora_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def probe(model):
    """A short text, (1, 8): tokens from the middle of the vocabulary, since its first ones may be padding."""
    return torch.arange(8, device=model.device)[None] + model.get_input_embeddings().weight.shape[0] // 2


def add_adapter(model, name, r=16, alpha=8, targets=None):
    """Add a named adapter to every plain linear layer, or to those of `targets`: last names or whole paths.

    The first adapter freezes the base. r 16 and alpha 8 are the paper's.
    """
    if not lora_layers(model):
        model.requires_grad_(False)
    layers, unknown = plain_layers(model, (nn.Linear, Conv1D, LoRALinear), probe(model)), set(targets or ())
    for path in list(layers) if targets else ():
        names = {path, path.rpartition(".")[2]}
        unknown -= names
        if not names & set(targets):
            del layers[path]
    if unknown or not layers:
        raise UserError(f"the model has no linear layer to adapt {', '.join(sorted(unknown))[:200]}".rstrip())
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            model.set_submodule(path, layer)
        layer.add(name, r, alpha)


def use_adapter(model, name):
    """Make one adapter active (None: the bare base)."""
    for layer in lora_layers(model).values():
        layer.active = name if name in layer.lora_A else None


def adapter_tensors(model, name):
    """`{PEFT's name: parameter}` of an adapter."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name]
            tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name]
    return tensors


def adapter_parameters(model, name):
    return list(adapter_tensors(model, name).values())


def save_adapter(model, name, folder):
    """Write an adapter in PEFT's format."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.lora_A}
    first = next(iter(layers.values()))
    r = len(first.lora_A[name])
    fields = {"r": r, "lora_alpha": first.scale[name] * r, "fan_in_fan_out": isinstance(first.base, Conv1D),
              "base_model_name_or_path": model.name_or_path, "target_modules": sorted(layers)}
    write_adapter(folder, fields, adapter_tensors(model, name))


def load_adapter(model, name, folder):
    """Read an adapter in PEFT's format, ours or `peft`'s, under a name; the model may be bare or carry others."""
    r, alpha, saved = read_adapter(folder)
    add_adapter(model, name, r, alpha, {key.split(".lora_")[0].removeprefix("base_model.model.") for key in saved})
    parameters = adapter_tensors(model, name)
    if {key: p.shape for key, p in parameters.items()} != {key: tensor.shape for key, tensor in saved.items()}:
        raise UserError(f"{folder} was made for another base model: its layers or shapes do not fit")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(saved[key])


# ---------------------------------------------------------------------------------------------------------
# The two players


@dataclasses.dataclass
class Step:
    """One decision, from the state in which it is made to the loss.

    The players make it, play adds action and reward, `rl.py` the advantage. Nothing of it is made twice.
    """

    state: str
    actions: tuple
    reflection: str | None = None
    prompt: str = ""  # of the policy
    ids: list = None  # token ids of the prompt
    label_ids: tuple = ()  # tokens that name the actions
    log_probs: list = None  # of all actions
    action: int = -1  # index of the one taken
    reward: float = 0.0
    advantage: float = 0.0
    target: float = 0.0  # what the critic should have said
    weight: float = 1.0  # of a replayed step: min(1, pi / mu)

    @property
    def log_prob(self):
        return self.log_probs[self.action]


def load_base(path="nano", device="cpu", dtype="fp32"):
    """A causal LM and its tokenizer from a Hugging Face directory (or a hub name, if there is a network).

    `dtype`: of the frozen weights, see `--dtype`. Code that comes with a checkpoint is never run.
    """
    path = NANO if path == "nano" else path
    model, tokenizer = read_base(path, torch.bfloat16 if dtype == "bf16" else torch.float32)
    model = model.to(device).eval()  # eval(): dropout stays off in every stage, LoRA has none
    envs.beside("../models/checks.py").check_base(model, tokenizer, path)
    return model, tokenizer


def right_pad(rows, device):
    """Rows of token ids -> (B, T). What stands to the right of a row a causal model never sees: no mask is needed."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def takes(model, *names):
    """Whether the model's forward has these arguments."""
    return set(names) <= set(inspect.signature(model.forward).parameters)


def forward(model, ids, rows, places, **options):
    """The model's own forward on right-padded ids, (B, T), with logits at `ids[rows, places]` only: (N, V).

    Its own, because some models scale, cap or transform their logits. Nothing is padded on the left, so positions and
    attention are those of each row alone, in every architecture.
    """
    # The LM head is given nothing else: with a large vocabulary it costs as much as several layers.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, places],))
    try:
        return model(ids, use_cache=False, **options)
    finally:
        hook.remove()


class Players:
    """Reflector and policy on one base. `reflection=False` leaves the reflector out (the paper's ablation).

    No forward pass has more than `micro_batch` texts.
    """

    memo_size = 100_000  # reflections remembered

    def __init__(self, model, tokenizer, reflection=True, labels="letters", max_reflection=96, dtype="fp32",
                 micro_batch=32):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.labels = Labels(tokenizer, labels)
        self.reflection, self.max_reflection = reflection, max_reflection
        self.dtype, self.micro_batch = dtype, micro_batch
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.cache_name = "cache_params" if takes(model, "cache_params") else "past_key_values"
        self.last_logits = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        # The reflector is frozen and greedy: its reflection of a state is written once.
        self.reflections = {}
        self.counts = collections.Counter(hits=0, misses=0, cuts=0)  # of reflections: known, written, cut off

    @functools.cached_property
    def counts_from_0(self):
        """Whether the model takes positions and counts them from 0, as most do.

        It is told them even where nothing is padded: the caches of some hybrids (Bamba) do not know how long they are.
        """
        if not takes(self.model, "position_ids"):
            return False
        ids = probe(self.model)
        with torch.no_grad(), self.autocast():
            own = self.model(ids).logits
            ours = self.model(ids, position_ids=torch.arange(8, device=self.device)[None]).logits
        return torch.allclose(own, ours, atol=1e-3 * own.abs().max().item())

    @functools.cached_property
    def can_pad(self):
        """Whether rows of several lengths can be decoded together.

        A state that is updated token by token (Mamba and its kind) would take in the padding, and no row can leave it.
        """
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        stateful = self.model._is_stateful or kinds - {"full_attention", "sliding_attention", "chunked_attention"}
        return not stateful and self.counts_from_0 and takes(self.model, "attention_mask", "past_key_values")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "autocast")

    def check_length(self, rows, room=0):
        longest = max(map(len, rows))
        if longest + room > self.context:
            raise UserError(f"a prompt of {longest} tokens, and {room} to write, exceeds the model's context of "
                            f"{self.context}: give the environment a smaller text budget")

    # Player 1

    @torch.inference_mode()
    def reflect(self, states):
        """One reflection per state, a single line of text."""
        new = [state for state in dict.fromkeys(states) if state not in self.reflections]
        self.counts.update(misses=len(new), hits=len(states) - len(new))
        for start in range(0, len(new), self.micro_batch):
            part = new[start : start + self.micro_batch]
            written = self.generate([reflector_prompt(state) for state in part])
            self.reflections.update(zip(part, written, strict=True))
        texts = [self.reflections[state] for state in states]
        while len(self.reflections) > self.memo_size:  # forget the oldest
            del self.reflections[next(iter(self.reflections))]
        return texts

    def generate(self, prompts):
        """Greedy decoding until EOS, all prompts at once where the model can pad, else one by one."""
        use_adapter(self.model, "reflect")
        rows = encode_all(self.tokenizer, prompts)
        self.check_length(rows, room=self.max_reflection)
        return self.decode(rows) if self.can_pad else [text for row in rows for text in self.decode([row])]

    def decode(self, rows):
        """Rows of token ids -> the texts that follow, with a KV cache; a row that has ended leaves the batch.

        Left-padded, so that all go on from the last position. The mask comes from lengths: a padding id that equals EOS
        does no harm.
        """
        ids, mask = [], []
        for row in rows:
            padding = [0] * (max(map(len, rows)) - len(row))
            ids.append(padding + row)
            mask.append(padding + [1] * len(row))
        ids, mask = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        going = list(range(len(rows)))  # the number of the row that stands at each place of the batch
        written, cache, use_cache = [[] for _ in rows], None, takes(self.model, self.cache_name)
        for _ in range(self.max_reflection):
            inputs = {self.cache_name: cache} if cache else {}
            if self.can_pad:
                inputs["attention_mask"] = mask
            if self.counts_from_0:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            with self.autocast():
                output = self.model(ids, use_cache=use_cache, **inputs, **self.last_logits)
            token, cache = output.logits[:, -1].argmax(-1), output.get(self.cache_name)  # (B,)
            kept = []  # places of the rows that go on
            for place, t in enumerate(token.tolist()):
                if t != self.tokenizer.eos_token_id:
                    written[going[place]].append(t)
                    kept.append(place)
            going = [going[place] for place in kept]
            if not going:
                break
            if len(kept) < len(token):
                kept = torch.tensor(kept, device=self.device)
                token, mask = token[kept], mask[kept]
                cache.batch_select_indices(kept)
            use_cache = bool(cache)  # without one the whole texts are read again
            mask = F.pad(mask, (0, 1), value=1)
            ids = token[:, None] if use_cache else torch.cat([ids, token[:, None]], dim=1)  # one new token a row
        self.counts["cuts"] += len(going)  # cut off by the limit
        texts = [one_line(self.tokenizer.decode(tokens)) for tokens in written]
        for number in going:  # end a cut text with its last whole sentence, as SFT's texts do
            texts[number] = texts[number][: texts[number].rfind(".") + 1] or texts[number]
        return texts

    # Player 2

    def steps(self, states, menus, reflections=None):
        """A `Step` for each state and its actions: reflection, prompt and menu; nothing is scored yet.

        The reflector writes the reflections, unless they are given (the teacher's, in SFT).
        """
        if reflections is None:
            reflections = self.reflect(states) if self.reflection else [None] * len(states)
        steps = []
        for state, actions, reflection in zip(states, menus, reflections, strict=True):
            labels, ids = self.labels(actions)
            prompt = policy_prompt(state, reflection, actions, labels)
            steps.append(Step(state, actions, reflection, prompt, label_ids=ids))
        # All prompts of a turn at once: the tokenizer is fast on many texts.
        for step, ids in zip(steps, encode_all(self.tokenizer, [step.prompt for step in steps]), strict=True):
            step.ids = ids
        return steps

    def forward(self, steps, adapter="policy", hidden=False):
        """Logits at the end of each prompt, (B, V), by the model's own forward: some models scale or cap them.

        With `hidden` also the last hidden state there, (B, d). Equal prompts share one row of the forward pass.
        """
        rows, row_of, index = [], {}, []  # index: the row of each step
        for step in steps:
            if step.prompt not in row_of:
                row_of[step.prompt] = len(rows)
                rows.append(step.ids)
            index.append(row_of[step.prompt])
        use_adapter(self.model, adapter)
        self.check_length(rows)
        at = range(len(rows)), torch.tensor([len(row) - 1 for row in rows], device=self.device)  # the end of each row
        with self.autocast():
            output = forward(self.model, right_pad(rows, self.device), *at, output_hidden_states=hidden)
        logits = output.logits[index]  # a row for each step again
        return (logits, output.hidden_states[-1][at][index]) if hidden else logits

    def log_probs(self, logits, steps):
        """Log-probabilities of the actions, (B, A) in fp32: row b has one for each action of step b, then -inf."""
        longest = max(len(step.label_ids) for step in steps)
        ids = torch.zeros(len(steps), longest, dtype=torch.long)
        valid = torch.zeros(len(steps), longest, dtype=torch.bool)
        for row, step in enumerate(steps):
            ids[row, : len(step.label_ids)] = torch.tensor(step.label_ids)
            valid[row, : len(step.label_ids)] = True
        # Invalid actions get no probability at all: the softmax is over the columns of this menu.
        chosen = logits.float().gather(1, ids.to(logits.device))  # (B, A)
        return chosen.masked_fill(~valid.to(logits.device), -torch.inf).log_softmax(-1)

    @torch.inference_mode()
    def score(self, steps, adapter="policy"):
        """Set `log_probs` of the steps, in micro-batches of about one length."""
        ordered = sorted(steps, key=lambda step: len(step.ids))  # little padding
        for start in range(0, len(ordered), self.micro_batch):
            part = ordered[start : start + self.micro_batch]
            rows = self.log_probs(self.forward(part, adapter), part).tolist()
            if any(math.isnan(row[0]) for row in rows):  # one logit that is not finite makes the whole row NaN
                raise UserError("the model's outputs are not finite: a damaged base, or too large a learning rate")
            for step, row in zip(part, rows, strict=True):
                step.log_probs = row[: len(step.label_ids)]

    # Both

    def __call__(self, episodes, known):
        """The next step of each episode: what `play` asks of an actor.

        What is in the dict `known` keeps its reflection and probabilities: no weight changes while playing. Only the
        action is drawn again.
        """
        keys = [(episode.state, episode.actions) for episode in episodes]
        new = [key for key in dict.fromkeys(keys) if key not in known]  # each once, in order
        if new:
            steps = self.steps(*zip(*new, strict=True))
            self.score(steps)
            known.update(zip(new, steps, strict=True))
        return [dataclasses.replace(known[key]) for key in keys]  # copies: each gets its own action and reward


# ---------------------------------------------------------------------------------------------------------
# Play


@dataclasses.dataclass
class Episode:
    """A task while it is played, and afterwards: `state` and `actions` are those that come next."""

    task: object
    rng: random.Random = None  # its own; None when the episode is over, as is the environment
    env: object = None
    state: str = ""
    actions: tuple = ()
    steps: list = dataclasses.field(default_factory=list)
    success: bool = False
    terminated: bool = False
    truncated: bool = False

    @property
    def over(self):
        return self.terminated or self.truncated

    @property
    def total(self):
        """Undiscounted return."""
        return sum(step.reward for step in self.steps)

    def begin(self, env, options):
        self.env = env
        state, info = env.reset(seed=self.rng.getrandbits(32), options={**(options or {}), "task": self.task})
        self.see(state, info)

    def see(self, state, info):
        """Copy what the environment returned: it may change its `info` at the next step."""
        self.state, self.actions, self.success = state, tuple(info["actions"]), bool(info["success"])

    def take(self, step, greedy):
        """Choose the action of a step, a sample (temperature 1) or the most probable one, and carry it out."""
        if greedy:
            step.action = step.log_probs.index(max(step.log_probs))
        else:
            weights = list(map(math.exp, step.log_probs))
            step.action = self.rng.choices(range(len(weights)), weights)[0]
        state, reward, terminated, truncated, info = self.env.step(step.action)
        step.reward, self.terminated, self.truncated = float(reward), bool(terminated), bool(truncated)
        self.see(state, info)
        self.steps.append(step)


def play(actor, make_env, tasks, options=None, seed=0, numbers=None, greedy=False, batch=64, known=None):
    """One `Episode` per task, in the order of the tasks, at most `batch` of them side by side.

    An environment that ends gets the next task at once, so the batch stays full. Episode i draws from an RNG of its
    own, seeded by `(seed, numbers[i])`: what it does depends on no other. `actor(episodes, known)` gives a scored
    `Step` for each (see `Players.__call__`); pass a dict `known` to share it with the next call.
    """
    episodes = []
    for number, task in zip(numbers or range(len(tasks)), tasks, strict=True):
        episodes.append(Episode(task, random.Random(f"{seed}/{number}")))
    waiting, playing, known = collections.deque(episodes), [], {} if known is None else known
    free = [make_env() for _ in range(min(batch, len(tasks)))]  # environments without an episode
    while waiting or playing:
        while waiting and free:
            episode = waiting.popleft()
            episode.begin(free.pop(), options)
            playing.append(episode)
        for episode, step in zip(playing, actor(playing, known), strict=True):
            episode.take(step, greedy)
            if episode.over:
                free.append(episode.env)
                episode.env = episode.rng = None
        playing = [episode for episode in playing if not episode.over]
    return episodes


# ---------------------------------------------------------------------------------------------------------
# Running it

def load_players(args, adapters):
    """Players on `args.base`; `adapters` maps names to the folders that hold them."""
    model, tokenizer = load_base(args.base, args.device, args.dtype)
    if args.gradient_checkpointing:
        envs.beside("../models/checks.py").recompute(model)
    for name, folder in adapters.items():
        load_adapter(model, name, folder)
    has_reflector = "reflect" in adapters
    return Players(model, tokenizer, has_reflector, args.labels, args.max_reflection, args.dtype, args.micro_batch)


def merge(args, name, folder, out):
    """Write the base with one adapter in its weights: a plain model that needs nothing of ours."""
    players = load_players(args, {name: folder})
    for path, layer in lora_layers(players.model).items():
        change = layer.lora_B[name] @ layer.lora_A[name] * layer.scale[name]  # (d_out, d_in)
        with torch.no_grad():
            layer.weight.add_(change.T if isinstance(layer.base, Conv1D) else change)
        players.model.set_submodule(path, layer.base)
    players.model.save_pretrained(out)
    players.tokenizer.save_pretrained(out)
    print(f"{out}: {args.base} with {folder} in its weights")


def main():
    parser = argparse.ArgumentParser(description="Play one episode and show every step.")
    own = {
        "run": ("", "run folder whose adapters play, the newest of the environment (or the shipped) if none is given"),
        "split": ("", "split of the task, the first that rl.py evaluates if none is given"),
        "task": (0, "index of the task in the split", 0),
        "greedy": (False, "take the most probable action instead of a sample"),
        "watch": (False, "animate the episode in the terminal, a step a second"),
        "merge": ("", "do not play: write both players as plain models to MERGE/reflect and MERGE/policy"),
    }
    add_options(parser, COMMON, own)
    args = parse_args(parser)
    # If none is named: the newest run of the environment that holds a policy, else the shipped players, else nobody.
    able = [folder for folder in runs_of(args) if (folder / "policy" / "adapter_config.json").is_file()]
    shipped = NANO / "adapters" / args.env
    if not args.run and not able and shipped.is_dir() and args.base in ("nano", os.path.abspath(NANO)):
        print(f"no run of {args.env} in {args.runs}: the shipped players play until python rl.py has trained yours\n")
        able = [shipped]
    if not args.run and not able:
        raise UserError(f"no run of {args.env} in {args.runs} can play: make one with python rl.py --env {args.env}")
    folder = args.run or able[-1]
    args = as_trained(args, folder)
    if args.merge:
        if Path(args.merge).exists():
            raise UserError(f"{args.merge} exists already")
        for name, adapter in adapters_of(folder).items():
            merge(args, name, adapter, Path(args.merge) / name)
        return
    env = env_factory(args)()
    split = args.split or env.panels[0]
    tasks = env.tasks(split)
    if args.task >= len(tasks):
        raise UserError(f"--task {args.task}: the {split} split has {len(tasks)} tasks")
    players = load_players(args, adapters_of(folder))
    [episode] = play(players, env_factory(args), [tasks[args.task]], seed=args.seed, greedy=args.greedy)
    if args.watch:
        watch(episode)
    else:
        print(show(episode))


if __name__ == "__main__":
    envs.run_main(main)
