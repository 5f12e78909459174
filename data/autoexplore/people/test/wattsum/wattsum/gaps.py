"""Finds holes in a series of readings."""

from datetime import timedelta

# Meters send every 15 minutes. A silence of up to 90 is normal when the cellar router restarts.
LONGEST = timedelta(minutes=90)


def find(readings):
    """Pairs of times with nothing between them."""
    holes = []
    for (before, _), (after, _) in zip(readings, readings[1:]):
        if after - before > LONGEST:
            holes.append((before, after))
    return holes


def share_missing(readings):
    """Of the whole time, between 0 and 1."""
    lost = sum((end - start for start, end in find(readings)), timedelta(0))
    return lost / (readings[-1][0] - readings[0][0])
