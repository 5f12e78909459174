"""Update ratings from tournament results."""


def expected_score(own, other):
    return 1 / (1 + 10 ** ((other - own) / 400))
