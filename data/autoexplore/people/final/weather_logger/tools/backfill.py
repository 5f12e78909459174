"""Fills the public map from the database after an outage."""

import sys

from logger import storage, upload

# Only run this after 22:00, the map limits us to 2000 rows an hour by day.


def main(first, last):
    with storage.connect("data/readings.db") as db:
        rows = db.execute("SELECT * FROM reading WHERE day BETWEEN ? AND ?", (first, last))
        upload.send(list(rows), sys.argv[3], sys.argv[4])


if __name__ == "__main__":
    main(*sys.argv[1:3])
