// Vouchers are good for three years, counted from the end of the year of purchase.
export function expiresOn(bought) {
  return new Date(Date.UTC(bought.getUTCFullYear() + 3, 11, 31));
}

export function isValid(voucher, now = new Date()) {
  return voucher.left > 0 && now <= expiresOn(voucher.bought);
}
