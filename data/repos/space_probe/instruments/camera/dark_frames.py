"""Subtract dark frames from camera images."""


def subtract_dark(image, dark):
    return [a - b for a, b in zip(image, dark)]
