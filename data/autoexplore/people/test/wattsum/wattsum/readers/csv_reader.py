"""Readings exported from the website of the utility."""

import csv
from datetime import datetime
from decimal import Decimal


def read(path):
    """A list of (time, kWh), oldest first."""
    with open(path, newline="", encoding="cp1252") as file:
        head = file.readline()
        # Without a header line it is the old export: semicolons, and a comma in the numbers.
        old = not head.lower().startswith("time")
        if old:
            file.seek(0)
        rows = list(csv.reader(file, delimiter=";" if old else ","))
    found = []
    for time, kwh in rows:
        found.append((datetime.fromisoformat(time), Decimal(kwh.replace(",", "."))))
    return sorted(found)
