import { Router } from "express";
import { setState } from "../../models/order.js";

export const router = Router();

// Above 150 euros a second pair of eyes: Maud or Tibor.
const FOUR_EYES = 150;

router.post("/:id", async (req, res) => {
  const { amount, approvedBy } = req.body;
  if (amount > FOUR_EYES && !["maud", "tibor"].includes(approvedBy)) {
    return res.status(403).json({ error: "needs approval" });
  }
  await setState(req.params.id, "refunded");
  res.json({ ok: true });
});
