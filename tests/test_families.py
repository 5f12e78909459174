"""Many families of causal LMs, tiny and random: loading, scores, SFT's loss, reflections, LoRA, PEFT.

The reference is the model's own plain forward on each text alone: no batch, no padding, no cache, all logits.
"""

import copy

import pytest
import torch
from conftest import randomise
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reflect_rl
import sft
from envs import UserError

# Sliding windows and chunks are shorter than the prompts; each kind of layer of a hybrid occurs.
COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
COMMON |= dict(vocab_size=5120, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
MOE = dict(num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
MLA |= dict(num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
SSM = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, mamba_expand=2)
SHARED = dict(shared_expert_intermediate_size=16)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
VISION |= dict(patch_size=14)

FAMILIES = {
    # GPT-2 and its age
    "gpt2": {}, "gpt_bigcode": {}, "gpt_neox": {}, "gptj": dict(rotary_dim=4), "codegen": dict(rotary_dim=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=6, num_layers=2, num_heads=4),
    "opt": dict(word_embed_proj_dim=32, ffn_dim=48), "bloom": {}, "mpt": {}, "xglm": dict(ffn_dim=48), "biogpt": {},
    "falcon": {}, "falcon:alibi": dict(alibi=True), "ctrl": dict(dff=48), "openai-gpt": {}, "persimmon": {},
    "bert:decoder": dict(is_decoder=True), "roberta:decoder": dict(is_decoder=True),
    # Llama and its relatives
    "llama": {}, "mistral": dict(sliding_window=6), "qwen3": HEAD, "phi": {}, "phi3": {}, "gemma": HEAD,
    "qwen2": dict(vocab_size=5121),  # AutoTokenizer gives Qwen2 a token of its own
    "gemma2": dict(final_logit_softcapping=3.0, **HEAD, **WINDOW), "gemma3_text": HEAD | WINDOW, "glm": HEAD,
    "gemma3": dict(text_config=COMMON | HEAD | WINDOW, vision_config=VISION, mm_tokens_per_image=4),
    "gemma4_text": dict(global_head_dim=8, vocab_size_per_layer_input=5120, hidden_size_per_layer_input=8, **HEAD,
                        **WINDOW),
    "cohere": dict(logit_scale=0.5), "cohere2": dict(logit_scale=0.5, **HEAD, **WINDOW), "glm4": HEAD,
    "granite": dict(logits_scaling=2.0, residual_multiplier=0.7), "olmo": {}, "olmo2": {}, "olmo3": WINDOW,
    "stablelm": {}, "starcoder2": dict(sliding_window=6), "smollm3": dict(no_rope_layers=[1, 0]), "nemotron": {},
    "exaone4": HEAD | WINDOW, "ernie4_5": HEAD, "helium": HEAD, "seed_oss": HEAD, "hunyuan_v1_dense": HEAD,
    "apertus": {}, "modernbert-decoder": dict(local_attention=6), "bitnet": {}, "diffllama": {}, "nanochat": {},
    "ministral": dict(sliding_window=6, **HEAD), "vaultgemma": HEAD | WINDOW,
    # Mixtures of experts
    "mixtral": MOE, "qwen2_moe": MOE | SHARED, "qwen3_moe": MOE | HEAD, "phimoe": MOE, "granitemoe": MOE, "olmoe": MOE,
    "gpt_oss": MOE | HEAD | WINDOW, "deepseek_v2": MOE | MLA, "deepseek_v3": MOE | MLA, "doge": MOE, "jetmoe": MOE,
    "glm4_moe": dict(n_shared_experts=1, first_k_dense_replace=1, **MOE, **HEAD), "minimax": MOE | HEAD,
    "llama4_text": dict(interleave_moe_layer_step=2, attention_chunk_size=6, intermediate_size_mlp=48,
                        no_rope_layers=[1, 0], **MOE, **HEAD),
    # Hybrids of attention and a recurrent state or a convolution
    "bamba": dict(attn_layer_indices=[1], **SSM), "falcon_h1": dict(mamba_d_ssm=64, **SSM, **HEAD),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8, mamba_dt_rank=4,
                  use_mamba_kernels=False, **MOE),
    "zamba2": dict(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1,
                   mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8,
                   num_key_value_heads=4, attention_head_dim=16, adapter_rank=4, use_mem_rope=True),
    "nemotron_h": dict(num_hidden_layers=4, layers_block_type=["mamba", "attention", "mlp", "mamba"], ssm_state_size=8,
                       mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=8, **HEAD),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], shared_intermediate_size=48, **SSM, **MOE),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], **MOE),
    "qwen3_next": MOE | SHARED | HEAD | LINEAR, "qwen3_5_text": HEAD | LINEAR, "olmo_hybrid": LINEAR,
    "kimi_linear": dict(linear_head_dim=8, linear_num_heads=4, **MOE, **MLA, **LINEAR),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], lru_width=32, attention_window_size=6, **HEAD),
    # A recurrent state only
    "mamba": dict(state_size=8), "falcon_mamba": dict(state_size=8), "rwkv": dict(attention_hidden_size=32),
    "mamba2": dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
}  # fmt: skip

# Read in both directions: what stands behind the prompt, or pads it, changes their scores.
REFUSED = {"bert": {}, "roberta": {}, "electra": {}, "roformer": {}, "big_bird": {}, "xlm": {}, "cpmant": {}}

MENU = ("move south", "move north", "move east", "move west", "pick up", "drop off")
STATES = ["Go.", "The taxi is at row 3.", "Row 1 column 2. Go on, go on, go on!", "A door.", "Taxi row 4. " * 5, "x"]
TEXTS = ["Go south.", "The passenger waits at row 2, so go on and on.", "Pick the passenger up, then go on.", "No"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(reflect_rl.NANO)


def save_model(name, fields, tokenizer, folder):
    """A random model with wide weights: errors show, and no two tokens are near a tie."""
    torch.manual_seed(1)
    if "text_config" not in fields:
        fields = COMMON | fields
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition(":")[0], **fields))
    with torch.no_grad():
        for path, p in model.named_parameters():
            if path.endswith(("A_log", "dt_bias", "dt_proj.bias")):  # a recurrent state that lasts for many tokens
                p.copy_(0.1 * torch.randn_like(p) - int("A_log" in path))
            else:
                p.copy_(0.2 * torch.randn_like(p) if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_players(folder):
    """Players with two random adapters on a saved model."""
    model, tokenizer = reflect_rl.load_base(folder)
    torch.manual_seed(0)
    for name in ("reflect", "policy"):
        reflect_rl.add_adapter(model, name, 4, 8)
    randomise(model, "reflect", "policy")
    return reflect_rl.Players(model, tokenizer, max_reflection=8)


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request, tokenizer, tmp_path_factory):
    """The folder of a family's random model."""
    folder = tmp_path_factory.mktemp("families") / request.param.replace(":", "-")
    save_model(request.param, FAMILIES[request.param], tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def players(family):
    return load_players(family)


def logits_of(model, ids):
    """The plain forward of one text alone, (T, V)."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(model, ids, n):
    """The n most probable tokens behind a text, each by a whole forward."""
    ids = list(ids)
    for _ in range(n):
        best = logits_of(model, ids)[-1].topk(2)
        assert best.values[0] - best.values[1] > 2e-5, "nearly a tie: the test would depend on rounding"
        ids.append(best.indices[0].item())
    return ids[-n:]


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_causal_lm_is_refused(name, tokenizer, tmp_path):
    """Catches a base whose scores would silently depend on the batch, and SFT that reads its own answer."""
    save_model(name, REFUSED[name], tokenizer, tmp_path)
    with pytest.raises(UserError) as refusal:
        load_players(tmp_path)
    assert len(str(refusal.value)) > 20 and "\n" not in str(refusal.value)


def test_loads(family):
    """Catches weights that do not survive the way through a file, and a model whose outputs say nothing."""
    model, _ = reflect_rl.load_base(family)
    plain = AutoModelForCausalLM.from_pretrained(family).eval()
    with torch.no_grad():
        found, other = logits_of(model, range(5, 40)), logits_of(model, [*range(5, 30), 9, *range(31, 40)])
        torch.testing.assert_close(found, logits_of(plain, range(5, 40)), **CLOSE)
    assert found.std() > 0.1 and (found[-1] - found[-2]).abs().max() > 0.1, "constant outputs"
    assert (found[-1] - other[-1]).abs().max() > 1e-2, "an earlier token does not matter"
    torch.testing.assert_close(found[:25], other[:25], **CLOSE, msg="the model reads ahead: it is no causal LM")


def test_scores(players):
    """Catches left padding that reaches a real token: in a window, a position, a bias, a recurrent state."""
    reflections = ["Short.", None, "Go on. " * 6, "Why is that?", "x y z", None]
    steps = players.steps(STATES, [MENU[:n] for n in (6, 2, 4, 5, 6, 3)], reflections)
    assert len({len(step.ids) for step in steps}) == 6
    players.score(steps)
    for step in steps:
        with torch.no_grad():
            expected = logits_of(players.model, step.ids)[-1][list(step.label_ids)].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(step.log_probs), expected, **CLOSE)
    assert max(max(step.log_probs) - min(step.log_probs) for step in steps) > 0.1


def test_sft_loss(players):
    """Catches a shift by one, padding that changes a row's loss, a mean of means; the same in gradients."""
    pairs = []
    for state, text in zip(STATES[:3] + STATES[4:5], TEXTS, strict=True):
        pairs.append(tuple(reflect_rl.encode_all(players.tokenizer, [state, text])))
    assert len({len(prompt) for prompt, _ in pairs}) == len({len(completion) for _, completion in pairs}) == 4
    reflect_rl.use_adapter(players.model, "policy")
    parameters = reflect_rl.adapter_parameters(players.model, "policy")
    nll = []
    for prompt, completion in pairs:
        log_probs = logits_of(players.model, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
        nll += [-row[token] for row, token in zip(log_probs, completion, strict=True)]
    expected = torch.stack(nll).mean()
    gradients = torch.autograd.grad(expected, parameters)
    with torch.no_grad():
        found = sft.completion_loss(players.model, *sft.collate(pairs))
    torch.testing.assert_close(found, expected, **CLOSE)
    players.micro_batch = 3
    assert sft.loss_of(pairs, players, backward=True) == pytest.approx(expected.item(), abs=1e-4)
    players.micro_batch = 32
    for p, gradient in zip(parameters, gradients, strict=True):
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)
        p.grad = None


def test_reflections(players):
    """Catches a cache that padding gets into, that loses its rows' order, or that goes on at a wrong position."""
    tokenizer, limit = copy.deepcopy(players.tokenizer), players.max_reflection
    reflect_rl.use_adapter(players.model, "reflect")
    prompts = reflect_rl.encode_all(tokenizer, [reflect_rl.reflector_prompt(state) for state in STATES])
    assert len(set(map(len, prompts))) > 4
    written = [greedy(players.model, ids, limit) for ids in prompts]

    def ends(token):  # where each row stops if this token is EOS
        return [row.index(token) if token in row else limit for row in written]

    new = {token for row in written for token in row}.difference(*prompts)
    eos = max(sorted(new), key=lambda token: len(set(ends(token))))
    assert len(set(ends(eos))) > 1, "all rows stop at the same step"
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    expected = []
    for row, end in zip(written, ends(eos), strict=True):
        text = reflect_rl.one_line(tokenizer.decode(row[:end]))
        expected.append(text[: text.rfind(".") + 1] or text if end == limit else text)
    assert len(set(expected)) > 1
    again = reflect_rl.Players(players.model, tokenizer, max_reflection=limit)
    assert again.reflect(STATES) == expected


def test_lora(family):
    """Catches a layer that the model reads past our wrapper, a transposed matrix, a parameter without gradient."""
    model, _ = reflect_rl.load_base(family)
    plain = AutoModelForCausalLM.from_pretrained(family).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        before = logits_of(model, range(5, 60))
        reflect_rl.add_adapter(model, "policy", 4, 8)
        reflect_rl.use_adapter(model, "policy")
        torch.testing.assert_close(logits_of(model, range(5, 60)), before, atol=1e-6, rtol=0)
        randomise(model, "policy")
        for path, layer in reflect_rl.lora_layers(model).items():
            change = 2 * layer.lora_B["policy"] @ layer.lora_A["policy"]
            weight = plain.get_submodule(path).weight
            weight += change.T if isinstance(layer.base, reflect_rl.Conv1D) else change
        expected = logits_of(plain, range(5, 60))
    assert (expected - before).abs().max() > 0.1
    found = logits_of(model, range(5, 60))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    found.log_softmax(-1)[:, 7].sum().backward()
    for path, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in path), path
        assert not p.requires_grad or (p.grad is not None and p.grad.abs().max() > 0), f"no gradient: {path}"


@pytest.mark.extra
@pytest.mark.parametrize("way", ["out", "in"])
def test_peft(way, family, players, tmp_path):
    """Catches names, scales and layouts of adapters that peft reads or writes otherwise."""
    peft, plain = pytest.importorskip("peft"), AutoModelForCausalLM.from_pretrained(family)
    if way == "out":
        model = players.model
        reflect_rl.save_adapter(model, "policy", tmp_path)
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    else:
        config = peft.LoraConfig(target_modules=list(reflect_rl.lora_layers(players.model)), r=4, lora_alpha=16)
        theirs = peft.get_peft_model(plain, config).eval()
        for path, p in theirs.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(p, std=0.3)
        theirs.save_pretrained(tmp_path)
        model, _ = reflect_rl.load_base(family)
        reflect_rl.load_adapter(model, "policy", tmp_path)
    with torch.no_grad():
        expected = logits_of(theirs, range(5, 60))
        reflect_rl.use_adapter(model, None)
        assert (logits_of(model, range(5, 60)) - expected).abs().max() > 0.1
        reflect_rl.use_adapter(model, "policy")
        # Kimi Linear's recurrent state makes 1.4e-4 of the rounding of sums in another order.
        torch.testing.assert_close(logits_of(model, range(5, 60)), expected, atol=3e-4, rtol=1e-4)
