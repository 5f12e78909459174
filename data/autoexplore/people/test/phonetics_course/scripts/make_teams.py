"""Draws the teams for the projects."""

import random
import sys

# Three to a team: with four, one always does nothing.
SIZE = 3

names = sys.stdin.read().split()
random.Random(2024).shuffle(names)
for i in range(0, len(names), SIZE):
    print(*names[i : i + SIZE])
