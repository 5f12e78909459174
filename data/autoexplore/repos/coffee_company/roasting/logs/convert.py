"""Turn the roast logs of the probe into celsius."""


def to_celsius(fahrenheit):
    return (fahrenheit - 32) / 1.8
