"""Correct the antenna frequency for doppler shift."""


def received_frequency(sent, speed, light=299792.458):
    return sent * (1 - speed / light)
