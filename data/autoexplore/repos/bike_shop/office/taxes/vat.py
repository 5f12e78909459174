"""Office taxes: split the vat from a receipt."""


def net_amount(gross, rate=0.19):
    return round(gross / (1 + rate), 2)
