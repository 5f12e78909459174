"""Compute the dose of a medicine from the weight."""


def dose(weight, milligrams_per_kilo):
    return round(weight * milligrams_per_kilo, 1)
