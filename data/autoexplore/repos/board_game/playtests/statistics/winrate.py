"""Statistics of playtests: how often the first player wins."""


def win_share(games):
    return sum(g.winner == 0 for g in games) / len(games)
