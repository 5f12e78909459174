// No more than 40 pots in one basket, the courier refuses heavier crates.
export const MAX_POTS = 40;
export const MAX_LINES = 60;
// Requests of one customer in a minute.
export const RATE = 90;
