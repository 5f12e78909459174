"""Daily gain from the hive scales."""


def daily_gain(weights):
    return [weights[i + 1] - weights[i] for i in range(len(weights) - 1)]
