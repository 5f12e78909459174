"""Meters on the two-wire bus in the cellar."""

import time

import serial

# Three tries, 200 ms apart: the meter of flat 6 never answers the first.
TRIES, PAUSE = 3, 0.2


def ask(port, address):
    """The raw answer of one meter, or None."""
    with serial.Serial(port, 2400, parity="E", timeout=1) as line:
        for _ in range(TRIES):
            line.write(bytes([0x10, 0x5B, address, (0x5B + address) % 256, 0x16]))
            answer = line.read(255)
            if answer:
                return answer
            time.sleep(PAUSE)
    return None
