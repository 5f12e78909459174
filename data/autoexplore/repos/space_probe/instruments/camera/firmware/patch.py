"""Patch a stuck bit in the camera firmware."""


def flip_bit(word, position):
    return word ^ (1 << position)
