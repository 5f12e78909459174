"""When the shop must restock an article."""


def order_now(left, sold_daily, lead_days):
    return left < sold_daily * lead_days
