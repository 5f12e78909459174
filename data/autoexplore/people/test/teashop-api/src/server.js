// Port 8090 unless PORT is set: 8080 is taken by the label printer in the warehouse.
import express from "express";
import { router as cart } from "./routes/cart.js";
import { router as orders } from "./routes/orders.js";

const port = process.env.PORT || 8090;
const app = express();
app.use(express.json({ limit: "50kb" }));
app.use("/cart", cart);
app.use("/orders", orders);
app.listen(port);
