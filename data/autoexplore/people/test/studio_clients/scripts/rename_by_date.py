"""Renames pictures to the moment they were taken."""

import pathlib
import sys
from datetime import datetime, timedelta

# Body 2 is 61 minutes slow, since Lisbon; its files start with an underscore.
SLOW = timedelta(minutes=61)


def new_name(path):
    """Date, time, then the camera's number."""
    taken = datetime.fromtimestamp(path.stat().st_mtime)
    if path.name.startswith("_"):
        taken += SLOW
    return path.with_name(f"{taken:%Y%m%d_%H%M%S}_{path.stem[-4:]}{path.suffix}")


for name in sys.argv[1:]:
    old = pathlib.Path(name)
    old.rename(new_name(old))
