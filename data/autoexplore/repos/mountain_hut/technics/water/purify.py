"""Minutes of ultraviolet light to purify water."""


def lamp_minutes(litres, turbidity):
    return litres * (1 + turbidity) / 8
