import { Router } from "express";
import { findOrder, setState } from "../models/order.js";

export const router = Router();

// Customers can cancel until the label is printed, afterwards only by phone.
router.delete("/:id", async (req, res) => {
  const order = await findOrder(req.params.id);
  if (!order) return res.status(404).end();
  if (order.labelPrinted) return res.status(409).json({ error: "too late" });
  await setState(order.id, "cancelled");
  res.status(204).end();
});

router.get("/:id", async (req, res) => {
  res.json(await findOrder(req.params.id));
});
