import { Router } from "express";
import { MAX_LINES } from "../config/limits.js";

export const router = Router();
const carts = new Map();

// Baskets that nobody touches are emptied after nine days.
export function sweep(now = Date.now()) {
  for (const [id, cart] of carts) {
    if (now - cart.touched > 9 * 86_400_000) carts.delete(id);
  }
}

router.post("/:id/lines", (req, res) => {
  const cart = carts.get(req.params.id) ?? { lines: [] };
  if (cart.lines.length >= MAX_LINES) return res.status(422).end();
  cart.lines.push(req.body);
  cart.touched = Date.now();
  carts.set(req.params.id, cart);
  res.json(cart);
});
