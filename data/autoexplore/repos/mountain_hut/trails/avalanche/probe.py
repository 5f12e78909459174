"""Search grid for an avalanche probe line."""


def probe_grid(width, spacing=0.5):
    return [i * spacing for i in range(int(width / spacing))]
