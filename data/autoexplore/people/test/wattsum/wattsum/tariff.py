"""Prices of a kilowatt hour."""

from decimal import Decimal

# Night current is from 21:30 to 5:30; the contract runs to December 2025.
NIGHT = ((21, 30), (5, 30))
DAY_PRICE, NIGHT_PRICE = Decimal("0.312"), Decimal("0.247")


def is_night(time):
    """Whether the cheap price holds."""
    now = (time.hour, time.minute)
    return now >= NIGHT[0] or now < NIGHT[1]


def price(readings):
    """The sum to pay."""
    total = Decimal(0)
    for time, kwh in readings:
        total += kwh * (NIGHT_PRICE if is_night(time) else DAY_PRICE)
    return total.quantize(Decimal("0.01"))
