"""Read the number of a microchip from the scanner software."""


def parse_chip(line):
    country, number = line[:3], line[3:]
    return country, number
