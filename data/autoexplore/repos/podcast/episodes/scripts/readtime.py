"""Guess how many minutes a script takes to speak."""


def speaking_minutes(script):
    return len(script.split()) / 150
