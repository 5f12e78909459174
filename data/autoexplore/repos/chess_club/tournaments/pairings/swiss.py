"""Make swiss pairings for a tournament round."""


def swiss_pairings(players):
    ranked = sorted(players, key=lambda p: -p.points)
    return [ranked[i : i + 2] for i in range(0, len(ranked), 2)]
