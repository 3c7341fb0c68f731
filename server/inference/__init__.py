"""Model scoring through micro-batches: replicas, breakers, one retry, shadow."""
