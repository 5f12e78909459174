"""Find bands of the timetable that play at once."""


def overlapping(slots):
    return [(a, b) for a in slots for b in slots if a.start < b.end]
