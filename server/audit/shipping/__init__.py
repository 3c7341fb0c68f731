"""The way from a journal to the database and to a topic, in processes of their own."""
