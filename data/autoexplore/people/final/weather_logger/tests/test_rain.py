import pytest

from logger.drivers import rain


def test_bounce_is_one_tip(fake_serial):
    fake_serial.lines = [b"1.00", b"1.05", b"2.00"]
    assert rain.Gauge().read() == pytest.approx(0.4)


def test_nothing(fake_serial):
    fake_serial.lines = []
    assert rain.Gauge().read() == 0
