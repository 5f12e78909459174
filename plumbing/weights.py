"""Models and adapters from elsewhere: whole and of a kind that we compute with, or refused in one line; and which of
a model's layers LoRA can change."""

import functools
import inspect
import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from envs import UserError
from plumbing.runs import write

logging.set_verbosity_error()
logging.disable_progress_bar()


def read_base(path, dtype):
    """A causal LM and its tokenizer from a Hugging Face directory (or a hub name, if there is a network).

    Code that comes with a checkpoint is never run.
    """
    is_folder = os.path.isdir(path)
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"{path} is no directory")  # nor a name of the hub, which would be asked for a minute
    if is_folder and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path} is no causal LM: it has no config.json")  # an adapter would have its base loaded
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False,
                                                           output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # a damaged file may raise anything
        what = "causal LM with a tokenizer" if is_folder else "directory, and no causal LM from the hub"
        raise UserError(f"{path} is no {what}: {' '.join((str(error) or repr(error)).split())[:300]}") from None
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:  # transformers would draw them at random
        raise UserError(f"{path} has no weights of the right shape of {', '.join(lacking)[:200]}")
    names, unused = dict(model.named_parameters()), sorted(info["unexpected_keys"])
    scales = [key for key in unused if key.rpartition("weight")[0] + "weight" in names]  # `x.weight_scale_inv`
    if getattr(model.config, "quantization_config", None) or scales:
        raise UserError(f"{path} is quantised: {', '.join(scales)[:200] or 'load it in full precision first'}")
    if unused:
        print(f"note: {path} has {len(unused)} tensors that this model does not use, such as {unused[0]}")
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------
# PEFT's format: adapter_config.json and adapter_model.safetensors

# PEFT's fields that say where an adapter came from, how it was trained or on which layers it sits, which its tensors
# say, too. Any other one that is set would change what it computes.
HARMLESS = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
            "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights",
            "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
            "corda_config", "megatron_config", "megatron_core", "qalora_group_size"}
PLAIN_INIT = ("True", "False", "None", "gaussian", "orthogonal", "eva")  # the others change the base as well


def hub_name(path):
    """What a base is called elsewhere: a folder of the hub's cache by its name on the hub."""
    found = re.search(r"models--([^/]+)/snapshots/", Path(path).as_posix())
    return found[1].replace("--", "/") if found else path


def write_adapter(folder, fields, tensors):
    """Write an adapter's tensors, `{PEFT's name: tensor}`, and the `fields` of its config that are its own."""
    folder = Path(folder)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    config |= fields | {"inference_mode": True, "base_model_name_or_path": hub_name(fields["base_model_name_or_path"])}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")  # last: it says "complete"


def read_adapter(folder):
    """An adapter's `(r, alpha, {PEFT's name: tensor})`; a `UserError` where we would compute something else with it."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        saved = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        r, alpha, kind = config["r"], config["lora_alpha"], config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} holds no complete adapter: {error!r}") from None
    if kind != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{folder}: only plain LoRA without biases is supported, not {kind}")
    refused = [field for field in config if config[field] and field not in HARMLESS]
    if str(config.get("init_lora_weights")) not in PLAIN_INIT:
        refused.append(f"init_lora_weights {config['init_lora_weights']}")
    if refused:
        raise UserError(f"{folder}: only plain LoRA is supported, not {', '.join(refused)}")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise UserError(f"{folder}: r {r!r} and lora_alpha {alpha!r} are no rank and no number")
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        raise UserError(f"{folder} has weights that are not finite")
    return r, alpha, saved

# ---------------------------------------------------------------------------------------------------------
# Layers


def plain_layers(model, kinds, ids):
    """`{path: layer}` of the layers of these `kinds` that LoRA can change: those that a pass over text calls, but the
    LM head. `ids`: a short text, (1, T).

    A vision tower is not called. A layer whose weight another module reads by itself (Mamba's fast path) is left alone,
    as `peft` does. In a mixture of experts a pass calls some experts only, so one call counts for all layers of the
    same name. Where the experts are one fused tensor, `peft` would take layers called gate_proj, up_proj or down_proj
    for theirs: these get no LoRA.
    """
    layers, called = {}, set()
    fused = any("experts" in path and weight.ndim == 3 for path, weight in model.named_parameters())
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        if not isinstance(module, kinds) or module is model.get_output_embeddings():
            continue
        if fused and leaf in ("gate_proj", "up_proj", "down_proj"):
            continue
        code = source_of(type(model.get_submodule(parent)))
        if leaf != "base" and not re.search(rf"self\.{leaf}\.weight\b(?!\.dtype)", code):  # its type may be read
            layers[path] = module

    def note(module, inputs, result):
        if isinstance(result, torch.Tensor):  # a router may give more
            called.add(module)

    hook = nn.modules.module.register_module_forward_hook(note)
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    names = {re.sub(r"\d+", "*", path) for path, layer in layers.items() if layer in called}
    return {path: layer for path, layer in layers.items() if re.sub(r"\d+", "*", path) in names}


@functools.cache
def source_of(cls):
    try:
        return inspect.getsource(cls)
    except OSError:  # made at run time
        return ""
