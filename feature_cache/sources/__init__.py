"""Where market events come from: live exchanges, recordings and the simulator, each published to Kafka."""
