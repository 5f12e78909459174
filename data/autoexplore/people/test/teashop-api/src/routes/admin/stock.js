import { Router } from "express";

export const router = Router();

// Counted by hand on the last Friday of a month; the count wins over the computer.
router.put("/:sku", (req, res) => {
  const { counted, expected } = req.body;
  const lost = expected - counted;
  if (lost > 5) console.warn(`${req.params.sku}: ${lost} missing`);
  res.json({ sku: req.params.sku, stock: counted });
});
