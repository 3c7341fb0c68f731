"""The audit after the reply: rows are shipped to SQL and Kafka, verified, read, explained and replayed."""
