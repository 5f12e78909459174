"""Daily gain from the hive scales."""


def daily_gain(weights):
    return [b - a for a, b in zip(weights, weights[1:])]
