"""Plan the shifts of cafe staff fairly."""


def next_barista(rota):
    return min(rota, key=rota.get)
