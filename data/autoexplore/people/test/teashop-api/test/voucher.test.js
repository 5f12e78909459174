import assert from "node:assert";
import test from "node:test";
import { expiresOn, isValid } from "../src/models/voucher.js";

test("bought in January or December is the same", () => {
  assert.deepEqual(expiresOn(new Date("2024-01-02")), expiresOn(new Date("2024-12-30")));
});

test("empty is not valid", () => {
  assert.equal(isValid({ left: 0, bought: new Date() }), false);
});
