import pytest

from logger.drivers import rain


class FakeSerial:
    def __init__(self):
        self.lines = []

    @property
    def in_waiting(self):
        return len(self.lines)

    def readline(self):
        return self.lines.pop(0)


@pytest.fixture
def fake_serial(monkeypatch):
    line = FakeSerial()
    monkeypatch.setattr(rain.serial, "Serial", lambda *_: line)
    return line
