"""Speed and direction from the mast."""

import serial

# The vane was mounted 15 degrees off north; we subtract that here.
NORTH = 15


class Vane:
    def __init__(self, port="/dev/ttyUSB1"):
        self.line = serial.Serial(port, 4800)

    def read(self):
        speed, angle = map(float, self.line.readline().split(b","))
        return speed, (angle - NORTH) % 360
