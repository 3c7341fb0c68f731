"""Ships journal rows to the database and to a Kafka topic, in processes of their own."""
