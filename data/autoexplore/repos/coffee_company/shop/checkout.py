"""Add the voucher to the shop basket."""


def redeem_voucher(basket, voucher):
    basket["total"] -= voucher["worth"]
    return basket
