"""Height of the water at a time, from the gauge of Vestby harbour."""

import math

PERIOD = 12.42  # hours
MEAN, RANGE = 1.1, 0.8  # metres


def height(hours_since_high):
    return MEAN + RANGE / 2 * math.cos(2 * math.pi * hours_since_high / PERIOD)
