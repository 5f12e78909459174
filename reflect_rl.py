"""The two players: prompts, LoRA by hand, one-token action scoring, reflections, play.

One frozen LM carries two LoRA adapters. The reflector (`reflect`) continues a state with a short reflection; the
policy (`policy`) reads state, reflection and the enumerated actions, and answers with ONE token, an action's label.
Nothing here trains: `sft.py` and `rl.py` do, through `Players.log_probs` and the same prompts.

    code            paper     meaning
    state           s         text of the environment
    reflection      a_1       output of player 1, the reflector R_phi
    actions         A(s)      valid actions of this state; the policy's distribution is over these and nothing else
    label           a_2       one-token name of an action; output of player 2, the policy pi_theta
    log_prob                  log pi_theta(a_2 | s, a_1)

Deviations: the paper's players start from one pretrained LM and part; ours stay on it as two adapters, so two players
cost hardly more memory than one. We search the tokenizer for labels that really are one token behind a prompt.

    python reflect_rl.py --env taxi        # play one episode, show every state, reflection and probability
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import math
import os
import random
import re
import shutil
import string
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.pytorch_utils import Conv1D

import envs
from envs import UserError

logging.set_verbosity_error()
logging.disable_progress_bar()
NANO = Path(__file__).parent / "models" / "nano"

# ---------------------------------------------------------------------------------------------------------
# Prompts: one place for SFT, RL and evaluation


ACTION_HEADER = "# Action:\n"
LABELS = string.ascii_uppercase + string.ascii_lowercase + string.digits  # the labels to try first


def reflector_prompt(state):
    return f"{state}\n# Analyze:\n"


def policy_prompt(state, reflection, actions, labels):
    """Prompt of the policy; `reflection=None` is the paper's ablation without a reflector."""
    head = f"{state}\n" if reflection is None else f"{reflector_prompt(state)}{reflection}\n"
    menu = "".join(f"{label} {action}\n" for label, action in zip(labels, actions, strict=False))
    return f"{head}# Actions:\n{menu}{ACTION_HEADER}"


def encode(tokenizer, text):
    """Token ids of a prompt: with the tokenizer's BOS if it has that habit, never with a closing EOS."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def action_labels(tokenizer, prompt=ACTION_HEADER):
    """`(labels, ids)`: strings that continue a policy prompt by exactly one token, pairwise distinct, for any menu.

    Letters first, then digits, then short words of the vocabulary. "10" is two tokens to a digit-splitting
    tokenizer, and SentencePiece may add a space: so each candidate is tried behind the real end of a prompt.
    """
    vocabulary = sorted(
        {token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha()}, key=lambda t: (len(t), t)
    )
    before, labels, ids = encode(tokenizer, prompt), [], []
    for label in [*LABELS, *vocabulary]:
        after = encode(tokenizer, prompt + label)
        if len(after) == len(before) + 1 and after[:-1] == before and after[-1] not in (*ids, tokenizer.unk_token_id):
            labels.append(label)
            ids.append(after[-1])
        if len(labels) == 128:
            break
    return labels, ids


class Labels:
    """Names the actions of a menu by one token each: `labels(actions)` gives `(labels, token ids)`, all distinct.

    `letters`: A, B, C, ... in the menu's order (the paper numbers its actions). `words`: a token of the action's own text, the one
    that the fewest actions of the menu share (`cat price list.md` -> ` price`), or a letter where all are taken. To
    answer with a letter means to look it up in the menu, which the nano base LM cannot do where the menu changes; a
    word needs no more than to be copied. Words do not depend on the menu's order: it is served alphabetically.
    Where the tokenizer has too few labels, a `UserError` names both counts.
    """

    def __init__(self, tokenizer, kind="letters"):
        if kind not in ("letters", "words"):
            raise UserError(f"labels are letters or words, not {kind!r}")
        self.tokenizer, self.kind = tokenizer, kind
        self.letters, self.ids = action_labels(tokenizer)
        self.end = encode(tokenizer, ACTION_HEADER)
        self.spelt, self.menus = {}, {}

    def __call__(self, actions):
        actions = tuple(actions)
        if actions not in self.menus:
            if len(self.menus) > 100_000:
                self.menus.clear()
            self.menus[actions] = self.name(actions)
        return self.menus[actions]

    def name(self, actions):
        chosen = [None] * len(actions)
        if self.kind == "words":
            tokens = [self.words_of(action) for action in actions]
            shared, taken = collections.Counter(t for row in tokens for t in set(row)), set()
            for i in sorted(range(len(actions)), key=lambda i: actions[i]):
                chosen[i] = min((t for t in tokens[i] if t not in taken), key=shared.__getitem__, default=None)
                taken.add(chosen[i])
        free = [t for t in self.ids if t not in chosen]
        if chosen.count(None) > len(free):
            raise UserError(f"{len(actions)} actions, but this tokenizer has only {len(self.ids)} one-token labels")
        ids = tuple(free.pop(0) if t is None else t for t in chosen)
        letters = dict(zip(self.ids, self.letters, strict=True))
        return [letters.get(t) or self.spell(t) for t in ids], ids

    def words_of(self, action):
        """Ids of the tokens that can be an action's label: those that may follow a prompt, and that are read in the
        action (a tokenizer may have marks of its own). In the middle of a line, where words begin with their space."""
        before, both = encode(self.tokenizer, "A"), encode(self.tokenizer, f"A {action}")
        return [t for t in both[len(before) :] if self.spell(t) and self.spell(t).strip() in action]

    def spell(self, token):
        """The text that continues a policy prompt by just this token, or None."""
        if token not in self.spelt:
            text = self.tokenizer.decode([token])
            texts = [
                t
                for t in (text, f" {text}")
                if t.strip() and encode(self.tokenizer, ACTION_HEADER + t) == [*self.end, token]
            ]
            self.spelt[token] = texts[0] if texts else None
        return self.spelt[token]


# ---------------------------------------------------------------------------------------------------------
# LoRA: W x + (alpha / r) B A x, with W frozen (Hu et al. 2021)


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` or GPT-2 `Conv1D` with any number of named low-rank updates, at most one of them active."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale, self.active = {}, None
        weight = base.weight
        # Conv1D stores its weight transposed, (in, out)
        self.out_features, self.in_features = reversed(weight.shape) if isinstance(base, Conv1D) else weight.shape

    def add(self, name, r, alpha):
        device = self.base.weight.device
        self.lora_A[name] = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device))  # B = 0: no change at first
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        self.scale[name] = alpha / r

    def forward(self, x):  # (..., in) -> (..., out)
        if self.active is None:
            return self.base(x)
        A, B, scale = self.lora_A[self.active], self.lora_B[self.active], self.scale[self.active]
        if self.merging_pays(x):
            weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
            return F.linear(x, torch.addmm(weight, B, A, alpha=scale), self.base.bias)
        A, B = scale * A.to(x.dtype), B.to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, A), B)  # rank r in between: never a full-size matrix

    def merging_pays(self, x):
        """Whether W + scale B A, made for this call only, is cheaper than the detour over rank r: where no gradient is
        wanted, for many tokens. Not in bf16, where a small B A would vanish in W's rounding."""
        exact = x.dtype == self.base.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        many = x.numel() * (1 + self.out_features / self.in_features) > self.in_features * self.out_features
        return exact and many and not torch.is_grad_enabled()


def lora_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapter(model, name, r=16, alpha=8, targets=None):
    """Add a named adapter to every linear layer but the LM head, or to those whose last name is in `targets`.

    The first call freezes the base and wraps its layers; r 16 and alpha 8 are the paper's.
    """
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        leaf = path.rpartition(".")[2]
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and module is not head
            and leaf != "base"
            and (not targets or leaf in targets)
        ):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, leaf, LoRALinear(module))
    layers = {
        path: layer for path, layer in lora_layers(model).items() if not targets or path.rpartition(".")[2] in targets
    }
    if not layers:
        raise UserError(f"the model has no linear layer to adapt{f' among {sorted(targets)}' if targets else ''}")
    for layer in layers.values():
        layer.add(name, r, alpha)
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            parameter.requires_grad_(False)


def use_adapter(model, name):
    """Make one adapter active (None: the bare base)."""
    for layer in lora_layers(model).values():
        layer.active = name if name in layer.lora_A else None


def adapter_parameters(model, name):
    return [
        p
        for layer in lora_layers(model).values()
        if name in layer.lora_A
        for p in (layer.lora_A[name], layer.lora_B[name])
    ]


def save_adapter(model, name, folder):
    """Write one adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.lora_A}
    tensors = {
        f"base_model.model.{path}.lora_{AB}.weight": getattr(layer, f"lora_{AB}")[name].detach().cpu().contiguous()
        for path, layer in layers.items()
        for AB in "AB"
    }
    first = next(iter(layers.values()))
    r = first.lora_A[name].shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": first.scale[name] * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "inference_mode": True,
        "base_model_name_or_path": model.name_or_path,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")  # last: it says "complete"


def load_adapter(model, name, folder):
    """Read an adapter in PEFT's format, ours or `peft`'s, under a name; the model may be bare or already wrapped."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} holds no complete adapter: {error}") from None
    unsupported = [
        key for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if unsupported or config.get("bias", "none") != "none" or config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: only plain LoRA is supported, not {', '.join(unsupported) or 'this kind of adapter'}"
        )
    targets = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors}
    add_adapter(model, name, config["r"], config["lora_alpha"], targets)
    wanted = {
        f"base_model.model.{path}.lora_{AB}.weight": getattr(layer, f"lora_{AB}")[name]
        for path, layer in lora_layers(model).items()
        if name in layer.lora_A
        for AB in "AB"
    }
    if {key: t.shape for key, t in tensors.items()} != {key: p.shape for key, p in wanted.items()}:
        raise UserError(f"{folder} was made for another base model: its layers or shapes do not fit")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


# ---------------------------------------------------------------------------------------------------------
# The two players


def load_base(path="nano", device="cpu", dtype=torch.float32):
    """A causal LM and its tokenizer from a Hugging Face directory (or a hub name, if there is a network)."""
    path = NANO if path == "nano" else path
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"{path} is no directory")  # nor a name on the hub, which would be asked for a minute
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        what = "causal LM with a tokenizer" if os.path.isdir(path) else "directory, and no causal LM from the hub"
        raise UserError(f"{path} is no {what}: {str(error).splitlines()[0]}") from None
    if not encode(tokenizer, ACTION_HEADER):
        raise UserError(f"{path} holds no tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no end-of-text token, which ends a reflection")
    return model.eval(), tokenizer  # eval(): dropout stays off in every stage, LoRA has none


class Players:
    """Reflector and policy on one base.

    `reflection=False` leaves the reflector out (the ablation); `reflect_temperature` 0 is greedy and memoised by state
    text, for the reflector is frozen when it plays. `forward_passes` of either kind run without dropout.
    """

    def __init__(
        self,
        model,
        tokenizer,
        reflection=True,
        reflect_temperature=0.0,
        max_reflection=96,
        bf16=False,
        memo_size=100_000,
        labels="letters",
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.labels = Labels(tokenizer, labels)
        self.reflection, self.reflect_temperature, self.max_reflection = reflection, reflect_temperature, max_reflection
        self.context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.bf16, self.memo_size = bf16, memo_size
        self.generator = torch.Generator().manual_seed(0)  # samples reflections, where that is asked for
        self.known, self.version, self.weights = {}, [], []  # see `scores`
        self.clear_memo()

    def clear_memo(self):
        """Forget all reflections: call it when the reflector has changed."""
        self.memo = collections.OrderedDict()
        self.counts = collections.Counter(hits=0, misses=0, cuts=0)  # of reflections: known, written, cut off

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def prompt(self, state, reflection, actions):
        return policy_prompt(state, reflection, actions, self.labels(actions)[0])

    def label_ids(self, actions):
        """Token ids of the labels of a menu, a tuple."""
        return self.labels(actions)[1]

    def left_pad(self, prompts, room=0):
        """Token ids, mask and positions, each (B, T), last real token at -1. The mask comes from lengths, not ids,
        so a pad id that equals EOS does no harm."""
        rows = [encode(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, rows))
        if longest + room > self.context:
            raise UserError(
                f"a prompt of {longest} tokens{f' and {room} to write' if room else ''} exceeds the model's context "
                f"of {self.context}: give the environment a smaller text budget"
            )
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.device), mask.to(self.device), (mask.cumsum(1) - 1).clamp(min=0).to(self.device)

    def features(self, prompts, adapter="policy"):
        """The policy's last hidden state at the last real position, (B, d). Equal prompts share one forward pass."""
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        use_adapter(self.model, adapter)
        ids, mask, positions = self.left_pad(list(unique))
        with self.autocast():
            hidden = self.model.base_model(
                ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden[:, -1][[unique[prompt] for prompt in prompts]]

    def score(self, features, menus):
        """Log-probabilities of the actions, (B, A) in fp32: row b has len(menus[b]) valid ones, the rest is -inf.
        `menus` holds the label token ids of each row; only these rows of the LM head are multiplied."""
        head, longest = self.model.get_output_embeddings(), max(map(len, menus))
        ids = torch.tensor(
            [[*menu, *[menu[0]] * (longest - len(menu))] for menu in menus], device=self.device
        )  # (B, A)
        logits = torch.einsum("bd,bad->ba", features.float(), head.weight[ids].float())
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[ids].float()
        counts = torch.tensor([len(menu) for menu in menus], device=self.device)
        valid = torch.arange(longest, device=self.device) < counts[:, None]
        return logits.masked_fill(~valid, -torch.inf).log_softmax(-1)

    def log_probs(self, prompts, menus, adapter="policy"):
        """`score` of the `features`: what rollout and update both call."""
        return self.score(self.features(prompts, adapter), menus)

    @torch.no_grad()
    def scores(self, prompts, menus):
        """`log_probs` as lists of floats, remembered while the policy's weights stay as they are: states come back."""
        weights = adapter_parameters(self.model, "policy")
        version = [(id(p), p._version) for p in weights]  # _version grows with every change in place
        if version != self.version or len(self.known) > self.memo_size:
            self.known, self.version, self.weights = {}, version, weights  # kept, so that no id is used again
        new = {prompt: menu for prompt, menu in zip(prompts, menus, strict=True) if prompt not in self.known}
        if new:
            rows = self.log_probs(list(new), list(new.values())).cpu()
            for (prompt, menu), row in zip(new.items(), rows, strict=True):
                self.known[prompt] = row[: len(menu)].tolist()
        return [self.known[prompt] for prompt in prompts]

    @torch.no_grad()
    def reflect(self, states):
        """One reflection per state, a single line of text."""
        if self.reflect_temperature > 0:
            return self.generate([reflector_prompt(state) for state in states])
        new = [state for state in dict.fromkeys(states) if state not in self.memo]
        self.counts.update(misses=len(new), hits=len(states) - len(new))
        fresh = self.generate([reflector_prompt(state) for state in new]) if new else []
        known = {state: self.memo[state] for state in states if state in self.memo} | dict(zip(new, fresh, strict=True))
        self.memo.update(zip(new, fresh, strict=True))
        while len(self.memo) > self.memo_size:
            self.memo.popitem(last=False)
        return [known[state] for state in states]

    def generate(self, prompts):
        """Decode with a KV cache until EOS, all rows at once; a finished row leaves the batch."""
        use_adapter(self.model, "reflect")
        ids, mask, positions = self.left_pad(prompts, room=self.max_reflection)
        rows, written, cache = torch.arange(len(prompts)), [[] for _ in prompts], None
        for _ in range(self.max_reflection):
            with self.autocast():
                output = self.model(
                    ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = output.past_key_values
            token = self.pick(output.logits[:, -1].float())  # (B,)
            going = (token != self.tokenizer.eos_token_id).nonzero()[:, 0]
            if len(going) < len(rows):
                rows, token, mask, positions = rows[going.cpu()], token[going], mask[going], positions[going]
                cache.batch_select_indices(going)
            if not len(rows):
                break
            for row, t in zip(rows.tolist(), token.tolist(), strict=True):
                written[row].append(t)
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        self.counts["cuts"] += len(rows)
        cut = set(rows.tolist())
        return [self.close(self.tokenizer.decode(tokens), row in cut) for row, tokens in enumerate(written)]

    def pick(self, logits):
        if self.reflect_temperature <= 0:
            return logits.argmax(-1)
        probabilities = (logits / self.reflect_temperature).softmax(-1).cpu()
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].to(logits.device)

    @staticmethod
    def close(text, cut):
        """The form that SFT texts have: one line; a cut reflection ends with its last whole sentence."""
        text = " ".join(text.split())
        return text[: text.rfind(".") + 1] or text if cut else text

    @torch.no_grad()
    def __call__(self, states, actions, envs=None):
        """The actor interface of `play`: reflections (or Nones) and log-probabilities, a list of floats a state."""
        reflections = self.reflect(states) if self.reflection else [None] * len(states)
        prompts = [self.prompt(*row) for row in zip(states, reflections, actions, strict=True)]
        return reflections, self.scores(prompts, [self.label_ids(a) for a in actions])


# ---------------------------------------------------------------------------------------------------------
# Play


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision; with `Episode`, all that the update gets to know of play."""

    state: str
    reflection: str | None
    actions: tuple
    action: int
    log_prob: float
    reward: float
    terminated: bool
    truncated: bool
    success: bool


@dataclasses.dataclass(frozen=True)
class Episode:
    task: object
    steps: tuple
    final_state: str  # what the last step led to; a critic values it where the horizon cut the episode off
    final_actions: tuple

    @property
    def success(self):
        return self.steps[-1].success

    @property
    def total(self):
        """Undiscounted return."""
        return sum(step.reward for step in self.steps)


def choose(log_probs, rng, greedy):
    """Index of an action: the most probable one, or a sample (temperature 1) drawn with the episode's own RNG."""
    if greedy:
        return max(range(len(log_probs)), key=log_probs.__getitem__)
    return rng.choices(range(len(log_probs)), [math.exp(p) for p in log_probs])[0]


def play(actor, make_env, tasks, *, options=None, seed=0, greedy=False, batch=64, numbers=None):
    """Play one episode per task, at most `batch` at a time; the list of `Episode`s is in the order of the tasks.

    An environment that ends gets the next task at once, so the batch stays full. Episode i draws from an RNG of its
    own, seeded by `(seed, numbers[i])` (numbers: 0, 1, ...): what it does depends on no other episode.
    `actor(states, actions, envs)` gives reflections and log-probabilities (see `Players.__call__`).
    """
    waiting, slots, finished = collections.deque(enumerate(tasks)), [], [None] * len(tasks)
    spare = [make_env() for _ in range(min(batch, len(tasks)))]
    while waiting or slots:
        while waiting and spare:
            i, task = waiting.popleft()
            env, rng = spare.pop(), random.Random(f"{seed}/{numbers[i] if numbers else i}")
            state, info = env.reset(seed=rng.getrandbits(32), options={**(options or {}), "task": task})
            slots.append((i, env, rng, [], state, info))
        states, actions = [slot[4] for slot in slots], [slot[5]["actions"] for slot in slots]
        reflections, log_probs = actor(states, actions, [slot[1] for slot in slots])
        playing = []
        for (i, env, rng, steps, state, info), reflection, row in zip(slots, reflections, log_probs, strict=True):
            action = choose(row, rng, greedy)
            after, reward, terminated, truncated, new_info = env.step(action)
            steps.append(
                Step(
                    state,
                    reflection,
                    info["actions"],
                    action,
                    row[action],
                    float(reward),
                    bool(terminated),
                    bool(truncated),
                    bool(new_info["success"]),
                )
            )
            if not (terminated or truncated):
                playing.append((i, env, rng, steps, after, new_info))
                continue
            spare.append(env)
            finished[i] = Episode(tasks[i], tuple(steps), after, new_info["actions"])
        slots = playing
    return finished


def show_step(step, log_probs=None):
    """A step as text: state, reflection, the menu with probabilities (those known), the action taken, the reward."""
    lines = [step.state] + ([f"# Analyze:\n{step.reflection}"] if step.reflection is not None else [])
    for i, action in enumerate(step.actions):
        p = math.exp(log_probs[i]) if log_probs else math.exp(step.log_prob) if i == step.action else None
        lines.append(f"  {'>' if i == step.action else ' '} {'' if p is None else f'{p:6.1%}':>6}  {action}")
    end = " success" if step.success else " failure" if step.terminated else " out of time" if step.truncated else ""
    return "\n".join(lines) + f"\nreward {step.reward:+.2f}{end}\n"


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse_option(text):
    """`key=value` of an environment option; the value is JSON where it parses, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_common_options(parser):
    """The options that every script shares: what is played, with what, where results go."""
    group = parser.add_argument_group("environment and model")
    group.add_argument("--env", default="taxi", help=f"{', '.join(envs.ENVS)}, or package.module:Class (default: taxi)")
    group.add_argument(
        "--env-option",
        action="append",
        default=[],
        type=parse_option,
        metavar="KEY=VALUE",
        help="an option of the environment's constructor, repeatable, such as mode=pickup",
    )
    group.add_argument("--repos", metavar="DIR", help="AutoExplore: your repositories instead of data/repos")
    group.add_argument("--games", metavar="PATH", help="ALFWorld: real game files instead of the built-in engine")
    group.add_argument(
        "--base", default="nano", help="directory of the base LM (default: nano, the shipped models/nano)"
    )
    group.add_argument(
        "--labels",
        choices=("letters", "words"),
        default="letters",
        help="one-token names of the actions, see Labels (default: letters; words for autoexplore and alfworld)",
    )
    group.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, mps (default: what is there)",
    )
    group.add_argument(
        "--bf16",
        choices=("auto", "on", "off"),
        default="auto",
        help="bf16 autocast, or fp32 (default: auto, on GPUs that have it)",
    )
    group.add_argument(
        "--micro-batch", type=int, default=64, help="texts a forward pass when training, for memory (default: 64)"
    )
    return group


def parse_args(parser):
    """The resolved options, with `bf16` a bool. What is not given is the environment's default, then the script's.

    `auto` means a GPU that has it. On a CPU bf16 has to be asked for: with AMX it speeds up full training and wide
    models, but with LoRA on the nano base the casts cost more than the products save (14k tokens/s against 21k).
    """
    settings = getattr(envs.env_class(parser.parse_args().env), "settings", {})
    parser.set_defaults(**settings)
    args = parser.parse_args()
    args.env_option += [(key, os.path.abspath(path)) for key in ("repos", "games") if (path := getattr(args, key))]
    counts = ("updates", "episodes", "save_every", "keep", "micro_batch", "trajectories", "batch", "rank", "repeats")
    least = dict.fromkeys((*counts, "group", "epochs", "minibatches"), 1)
    least |= dict.fromkeys(("replay", "replay_buffer", "warmup", "eval_every", "show_every"), 0)
    for key, lowest in least.items():
        if (value := getattr(args, key, None)) is not None and value < lowest:  # None: the algorithm's default
            raise UserError(f"--{key.replace('_', '-')} must be at least {lowest}, not {value}")
    for key in ("lr", "rl_lr", "critic_lr"):
        if not getattr(args, key, 1.0) > 0:
            raise UserError(f"--{key.replace('_', '-')} must be a number above 0, not {getattr(args, key)}")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UserError(f"unknown device {args.device!r}: cpu, cuda, cuda:1, mps, ...") from None
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.bf16 = args.bf16 == "on" or (args.bf16 == "auto" and on_gpu)
    return args


def env_factory(args):
    """A function that makes a new environment as `--env` and `--env-option` say."""
    options = dict(args.env_option)
    return lambda: envs.make(args.env, **options)


def short_name(env):
    """An environment's name as part of a folder's name."""
    return env.rpartition(":")[2].lower()


def load_players(args, folders):
    """Players on `args.base`; `folders` maps adapter names to the directories that hold them."""
    model, tokenizer = load_base(args.base, args.device)
    for name, folder in folders.items():
        load_adapter(model, name, folder)
    limit = {"max_reflection": args.max_reflection} if "max_reflection" in args else {}
    return Players(model, tokenizer, reflection="reflect" in folders, bf16=args.bf16, labels=args.labels, **limit)


def as_trained(args, config):
    """`args` with the environment, model, labels and reflection limit of a run's `config.json`; of the environment's
    options those given now win, so that `--games DIR` plays on the real engine what the built-in one has taught."""
    kept = {key: config[key] for key in ("env", "base", "labels", "max_reflection") if key in config}
    return argparse.Namespace(**vars(args) | kept | {"env_option": config["env_option"] + args.env_option})


# ---------------------------------------------------------------------------------------------------------
# Several processes (torchrun), each with its share of the work


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_gradients(parameters):
    """Add up the gradients of all processes, each of which saw its share of the batch."""
    if world() > 1:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)  # one message, not a hundred
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)


def summed(counter):
    """A counter added up over the ranks, each of which saw its share."""
    shares = [counter] * world()
    if world() > 1:
        dist.all_gather_object(shares, counter)
    total = collections.Counter()
    for share in shares:
        total.update(share)
    return total


def from_first(make):
    """`make()`, called by the first process alone; the others get its value."""
    box = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def join_processes(args):
    """Under torchrun: join the other processes, each with a GPU of its own where there are GPUs."""
    if "WORLD_SIZE" not in os.environ:
        return
    on_gpu = torch.device(args.device).type == "cuda"
    # the others wait while rank 0 runs SFT or an evaluation, which may take longer than the default 10 minutes
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=2))
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world()))))


# ---------------------------------------------------------------------------------------------------------
# Runs: runs/<name>/ holds config.json, log.jsonl, step-NNNNNN/ (checkpoints) and, when it is done, its adapters


def write_atomically(path, text):
    """Write a file beside its place and rename it in: a reader sees the old text or the new one, never half."""
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def save_checkpoint(run, step, write, keep=2):
    """`run/step-NNNNNN` filled by `write(folder)`, then renamed in; a kill leaves the older ones whole."""
    final, temporary = Path(run) / f"step-{step:06d}", Path(run) / f".step-{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    # torch reports a full disk as RuntimeError
    except (OSError, RuntimeError, UserError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save {final}: {str(error).splitlines()[0]}; older checkpoints are untouched") from None
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run):
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in Path(run).glob("step-*") if (path / "state.pt").is_file())


def open_run(run, config, resume=False):
    """Start or resume a run; returns the newest checkpoint to go on from, or None.

    An existing run is never overwritten: without `resume`, or with other settings than its own, that is an error.
    On resume the log is cut back to the checkpoint's step.
    """
    run, path = Path(run), Path(run) / "config.json"
    if not path.exists():
        make_folder(run)
        write_atomically(path, json.dumps(config, indent=2) + "\n")
        return None
    if not resume:
        raise UserError(f"{run} exists already: go on with --resume, or give another --name")
    old = read_config(run)
    changed = [key for key in config if old.get(key) != json.loads(json.dumps(config[key]))]
    if changed:
        raise UserError(
            f"{run} was started with other settings: "
            + ", ".join(f"{k} {old.get(k)!r}, now {config[k]!r}" for k in changed)
        )
    newest = checkpoints(run)[-1] if checkpoints(run) else None
    step = int(newest.name[5:]) if newest else -1
    log = run / "log.jsonl"
    if log.exists():  # a killed process may have left half a line, and lines behind the checkpoint
        lines = [
            line
            for line in log.read_text().splitlines(keepends=True)
            if line.endswith("}\n") and json.loads(line)["step"] <= step
        ]
        write_atomically(log, "".join(lines))
    return newest


@contextlib.contextmanager
def lock_run(run, wait=False):
    """Hold a run: a second process that wants it gets an error, or waits. The lock goes with its process, however that
    ends."""
    import fcntl

    make_folder(run)
    with (Path(run) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise UserError(f"another process is writing {run}") from None
            print(f"another process is writing {run}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_config(run):
    try:
        return json.loads((Path(run) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run: its config.json cannot be read ({error})") from None


def log_line(run, **values):
    try:
        with (Path(run) / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {run}/log.jsonl: {error.strerror}; the last checkpoint is good") from None


def find_adapters(run):
    """`{adapter name: folder}` of a run: its finished adapters, else those of its newest checkpoint."""
    read_config(run)
    for folder in (Path(run), *reversed(checkpoints(run))):
        found = {
            name: folder / name for name in ("reflect", "policy") if (folder / name / "adapter_config.json").is_file()
        }
        if "policy" in found:
            return found
    raise UserError(f"{run} holds no policy yet: it was stopped before its first checkpoint")


def runs_of(args):
    """The folders of all runs of `args.env`, whatever their names."""
    configs = sorted(Path(args.runs).glob("*/config.json"))
    return [
        path.parent for path in configs if short_name(read_config(path.parent).get("env", "")) == short_name(args.env)
    ]


def newest_run(args):
    """The newest run of `args.env` that can play."""
    for run in sorted(runs_of(args), key=lambda run: (run / "config.json").stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):
            find_adapters(run)
            return run
    raise UserError(
        f"no run of {args.env} in {args.runs}: make one with python rl.py --env {args.env}, or name one with --run"
    )


def main():
    parser = argparse.ArgumentParser(description="Play one episode and show every step.", allow_abbrev=False)
    add_common_options(parser)
    parser.add_argument("--run", help="run folder whose adapters play (default: the newest of this environment)")
    parser.add_argument("--split", default="test", help="split of the task (default: test)")
    parser.add_argument("--task", type=int, default=0, help="index of the task in the split (default: 0)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable action instead of a sample")
    args = parse_args(parser)
    run = args.run or newest_run(args)
    args = as_trained(args, read_config(run))
    players = load_players(args, find_adapters(run))
    tasks = env_factory(args)().tasks(args.split)
    if not 0 <= args.task < len(tasks):
        raise UserError(f"--task {args.task}: the {args.split} split has {len(tasks)} tasks")
    seen = []

    def watched(states, actions, envs):
        reflections, log_probs = players(states, actions, envs)
        seen.append(log_probs[0])
        return reflections, log_probs

    episode = play(watched, env_factory(args), [tasks[args.task]], seed=args.seed, greedy=args.greedy)[0]
    for step, log_probs in zip(episode.steps, seen, strict=True):
        print(show_step(step, log_probs))
    print(
        f"{'success' if episode.success else 'failure'} after {len(episode.steps)} steps, return {episode.total:+.2f}"
    )


if __name__ == "__main__":
    envs.run_main(main)
