"""Find free days for a rental booking."""


def free_days(bookings, month):
    taken = {day for b in bookings for day in b.days}
    return [d for d in month if d not in taken]
