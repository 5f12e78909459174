"""Reserve beds for guests and refuse overbooking."""


def reserve(free, wanted):
    if wanted > free:
        raise ValueError("the hut is full")
    return free - wanted
