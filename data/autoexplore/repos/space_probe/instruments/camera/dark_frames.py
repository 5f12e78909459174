"""Subtract dark frames from camera images."""


def subtract_dark(image, dark):
    return [pixel - dark[i] for i, pixel in enumerate(image)]
