"""Compute how long a spoke of the wheel must be."""

import math


def spoke_length(rim, hub, cross):
    return math.hypot(rim - hub, cross)
