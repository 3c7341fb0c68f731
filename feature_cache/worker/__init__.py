"""The feature worker: market events from Kafka, through the engines, to Redis."""
