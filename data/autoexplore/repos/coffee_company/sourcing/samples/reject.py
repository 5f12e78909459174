"""Decide whether a green sample is too moist to buy."""

LIMIT = 12.5


def too_moist(humidity):
    return humidity > LIMIT
