"""Cut long silence while editing."""


def shorten_gaps(gaps, longest=0.8):
    return [min(gap, longest) for gap in gaps]
