"""From samples to models in a model store, and the commands for it."""
