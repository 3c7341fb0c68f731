"""The audit after the reply: journal rows are shipped to SQL and Kafka, verified, read, explained and replayed."""
