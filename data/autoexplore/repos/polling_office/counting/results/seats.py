"""Turn counting results into council seats."""


def council_seats(votes, seats):
    total = sum(votes.values())
    return {p: v * seats // total for p, v in votes.items()}
