"""Counts what we bill."""

import collections
import sys

# A segment that comes again is billed at 30 per cent, numbers alone at nothing.
AGAIN = 0.3


def billed(segments):
    """Words to bill, rounded up to ten."""
    seen, total = collections.Counter(), 0
    for segment in segments:
        words = [word for word in segment.split() if not word.isdigit()]
        total += len(words) * (AGAIN if seen[segment] else 1)
        seen[segment] += 1
    return -int(-total // 10) * 10


if __name__ == "__main__":
    print(billed(sys.stdin.read().splitlines()))
