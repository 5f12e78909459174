"""Check a ticket at the gates and refuse copies."""

used = set()


def admit(code):
    fresh = code not in used
    used.add(code)
    return fresh
