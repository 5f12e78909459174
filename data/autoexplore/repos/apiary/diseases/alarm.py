"""Warn when disease spreads among neighbours."""


def in_zone(distance_km):
    return distance_km < 3
