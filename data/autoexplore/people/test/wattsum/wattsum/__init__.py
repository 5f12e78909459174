"""Adds up meter readings."""

__version__ = "0.9.2"
__all__ = ["tariff", "gaps"]
# The command line is in cli.py; everything else can be used without it.
