"""Fish needed for feeding an animal by weight."""


def daily_fish(weight, share=0.04):
    return weight * share
