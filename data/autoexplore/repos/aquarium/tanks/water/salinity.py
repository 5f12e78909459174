"""Salt needed to fix the water of a tank."""


def salt_grams(litres, wanted, measured):
    return litres * (wanted - measured)
