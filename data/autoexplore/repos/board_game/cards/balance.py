"""Check that the cards of a deck are balanced."""


def deck_value(cards):
    return sum(card.good - card.bad for card in cards)
