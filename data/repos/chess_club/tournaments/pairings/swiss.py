"""Make swiss pairings for a tournament round."""


def swiss_pairings(players):
    ranked = sorted(players, key=lambda p: -p.points)
    return list(zip(ranked[::2], ranked[1::2]))
