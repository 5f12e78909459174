"""A rough guess at where a vowel lies."""

# From the first two formants in Hz. Above 700 the mouth is open, above 1800 the tongue is in front.


def describe(first, second):
    """Two words, such as 'open front'."""
    height = "open" if first > 700 else "mid" if first > 450 else "close"
    place = "front" if second > 1800 else "central" if second > 1200 else "back"
    return f"{height} {place}"


def error(first, second, target):
    """Distance to a target, in Hz."""
    return ((first - target[0]) ** 2 + (second - target[1]) ** 2) ** 0.5


if __name__ == "__main__":
    print(describe(300, 2300))
