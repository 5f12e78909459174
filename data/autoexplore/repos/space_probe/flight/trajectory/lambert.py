"""Solve the transfer trajectory between two planets."""


def transfer_time(semi_major_axis):
    return 3.14159 * semi_major_axis**1.5
