/** How a call is made again: how often, and after how long. The numbers are those of the Python client. */

const FIRST_MS = 5;
const LONGEST_MS = 100;
const FACTOR = 4;
/** Failures that nobody has made up for, from which on nobody tries again. A success makes up for half of one. */
export const SPARE_FAILURES = 25;

/**
 * After how many milliseconds a call is made again on the same server: 5, 20, 80 and then 100, each ± 20 %.
 *
 * @param failures - How often it has failed there.
 */
export function pauseMs(failures: number): number {
  return Math.min(FIRST_MS * FACTOR ** (failures - 1), LONGEST_MS) * (0.8 + 0.4 * Math.random());
}

/** After how many milliseconds an order is asked for again whose key a process that is gone may hold for a while. */
export const HELD_MS = LONGEST_MS;
