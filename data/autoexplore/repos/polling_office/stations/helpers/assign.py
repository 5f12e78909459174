"""Assign helpers to a polling station near home."""


def nearest_station(home, stations):
    return min(stations, key=home.distance)
