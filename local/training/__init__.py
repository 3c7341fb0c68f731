"""From samples to models in a store, and the commands for it."""
