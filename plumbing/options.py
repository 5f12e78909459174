"""Options are tables `{name: (default, what it is)}`, with a third entry for the allowed values, the least one, or a
type. A script adds the tables of what it runs; a setting is a row and nothing else."""

import argparse
import itertools
import os

import torch

import envs
from envs import UserError, key_and_value

COMMON = {
    "env": ("taxi", "taxi, autoexplore, alfworld, Gymnasium's as gym:ID, or yours as package.module:Class"),
    "env_option": ([], "KEY=VALUE for the environment's constructor, repeatable, such as mode=pickup"),
    "repos": ("", "AutoExplore: a directory of yours instead of the shipped repositories"),
    "base": ("nano", "directory of the base LM; nano is the shipped models/nano"),
    "labels": ("letters", "one-token names of the actions, see Labels", ("letters", "words")),
    "max_reflection": (96, "token limit of a reflection", 1),
    "runs": ("runs", "folder of all runs"),
    "seed": (0, "seed of everything"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 or mps"),
    "dtype": ("fp32", "of the frozen base: fp32; bf16, half the memory; autocast, fp32 weights and bf16 products",
              ("fp32", "bf16", "autocast")),
    "gradient_checkpointing": (False, "compute activations again in the backward pass: slower, less memory"),
    "micro_batch": (32, "most texts in a forward pass, for memory; the results stay the same", 1),
}


def add_options(parser, *tables):
    """Add tables of options. A flag that is on by default becomes --no-NAME; a typo or a wrong value is an error."""
    for name, (default, text, *limit) in itertools.chain(*map(dict.items, tables)):
        option, details = "--" + name.replace("_", "-"), {"default": default, "dest": name, "help": text}
        if default is True:
            option, details["action"] = "--no-" + option[2:], "store_false"
        elif default is False:
            details["action"] = "store_true"
        elif default == []:
            details |= {"action": "append", "type": key_and_value, "metavar": "KEY=VALUE"}
        elif limit and isinstance(limit[0], tuple):
            details["choices"] = limit[0]
        elif limit and callable(limit[0]):
            details["type"] = limit[0]
            details["help"] += f" (default: {default})"
        else:
            details["type"] = number(type(default), *limit) if limit else type(default)
            details["help"] += f" (default: {default})" if default != "" else ""
        parser.add_argument(option, **details)


def number(kind, least):
    """An argparse type: an int or a float that is not below `least`."""

    def parse(text):
        value = kind(text)
        if not value >= least:  # this way round NaN is refused, too
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return parse


def parse_args(parser):
    """The resolved options. What is given wins over the environment's own defaults (`settings`), these over ours."""
    parser.allow_abbrev = False  # `--update 5` is a typo, not `--updates 5`
    parser.set_defaults(**envs.env_class(parser.parse_args().env).settings)
    args = parser.parse_args()
    if os.path.isdir(args.base):  # absolute, so that a run finds it from another folder
        args.base = os.path.abspath(args.base)
    if args.repos:
        args.env_option = [*args.env_option, ("repos", os.path.abspath(args.repos))]
    if vars(args).get("no_negatives"):
        args.negatives = 0.0
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    return args


def env_factory(args):
    """A function that makes a new environment as `--env` and `--env-option` say."""
    options = dict(args.env_option)
    return lambda: envs.make(args.env, **options)


def short_name(env):
    """An environment's name as part of a folder's name."""
    return env.rpartition(":")[2].lower()


def updates_or_auto(text):
    """An argparse type: a number of updates, or `auto`."""
    if text != "auto" and int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or auto, not {text}")
    return text if text == "auto" else int(text)
