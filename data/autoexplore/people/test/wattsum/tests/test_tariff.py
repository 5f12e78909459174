from datetime import datetime
from decimal import Decimal

from wattsum import tariff


# The bill of February 2023 was a cent too high: rounded per reading.
def test_rounds_once():
    readings = [(datetime(2023, 2, 1, 12), Decimal("0.02"))] * 3
    assert tariff.price(readings) == Decimal("0.02")


def test_night_begins_at_half_past():
    assert not tariff.is_night(datetime(2023, 2, 1, 21, 29))
    assert tariff.is_night(datetime(2023, 2, 1, 21, 30))


def test_nothing_costs_nothing():
    assert tariff.price([]) == 0
