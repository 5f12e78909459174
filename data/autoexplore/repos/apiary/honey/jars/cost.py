"""Cost of filled honey jars with lid and seal."""


def jar_cost(glass, lid, seal, honey):
    return glass + lid + seal + honey
