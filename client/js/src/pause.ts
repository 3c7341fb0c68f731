/** Waiting. */

/** The longest time that a timer takes; it fires at once for a longer one. */
const LONGEST_MS = 2 ** 31 - 1;

/** What `setTimeout` does, also for times that are longer than it knows: then it fires after 24 days. */
export function after(milliseconds: number, call: () => void): ReturnType<typeof setTimeout> {
  return setTimeout(call, Math.min(milliseconds, LONGEST_MS));
}

/** Waits, at most until the signal is aborted, which whoever waits looks at next. */
export function pause(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = after(milliseconds, end);
    function end() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    }
    signal?.addEventListener("abort", end);
    if (signal?.aborted) {
      end();
    }
  });
}
