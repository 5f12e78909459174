# The hour that is skipped in the last night of March must not count as a hole, see clock_goes_forward.
from datetime import datetime, timedelta

from wattsum import gaps

START = datetime(2024, 3, 30)


def test_none_in_regular_readings():
    assert gaps.find([(START + timedelta(minutes=15 * i), 1) for i in range(9)]) == []


def test_clock_goes_forward():
    assert gaps.find([(START, 1), (START + timedelta(hours=1), 1)]) == []


def test_power_cut():
    assert len(gaps.find([(START, 1), (START + timedelta(hours=5), 1)])) == 1
