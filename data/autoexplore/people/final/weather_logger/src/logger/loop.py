"""Reads all sensors, writes a row, sleeps until the next full minute."""

import time

from logger import storage
from logger.drivers import rain, wind

# A sensor that fails three times in a row is skipped until midnight.
MAX_FAILURES = 3


def read_all(sensors, failures):
    row = {}
    for name, driver in sensors.items():
        if failures.get(name, 0) >= MAX_FAILURES:
            continue
        try:
            row[name] = driver.read()
            failures[name] = 0
        except OSError:
            failures[name] = failures.get(name, 0) + 1
    return row


def main():
    sensors, failures = {"rain": rain.Gauge(), "wind": wind.Vane()}, {}
    while True:
        if time.time() % 86400 < 60:
            failures.clear()
        storage.save(read_all(sensors, failures))
        time.sleep(60 - time.time() % 60)


if __name__ == "__main__":
    main()
