"""The tipping bucket."""

import serial

# Two tips within 0.15 s are one: the reed switch bounces.
DEBOUNCE = 0.15


class Gauge:
    def __init__(self, port="/dev/ttyUSB0"):
        self.line = serial.Serial(port, 9600)
        self.last = 0.0

    def read(self):
        tips = 0
        while self.line.in_waiting:
            stamp = float(self.line.readline())
            tips += stamp - self.last > DEBOUNCE
            self.last = stamp
        return tips * 0.2
