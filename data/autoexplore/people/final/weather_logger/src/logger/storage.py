"""One table, one row a minute."""

import sqlite3

# WAL mode: the web page may read while we write.
# Synchronous is off because the laptop has a battery.
PRAGMAS = ("journal_mode=WAL", "synchronous=OFF")


def connect(path):
    db = sqlite3.connect(path)
    for pragma in PRAGMAS:
        db.execute("PRAGMA " + pragma)
    db.execute("CREATE TABLE IF NOT EXISTS reading (day, rain, speed, angle)")
    return db


def save(row, path="data/readings.db"):
    speed, angle = row.get("wind", (None, None))
    with connect(path) as db:
        values = (row.get("rain"), speed, angle)
        db.execute("INSERT INTO reading VALUES (date('now'), ?, ?, ?)", values)
