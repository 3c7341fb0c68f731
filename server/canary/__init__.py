"""A model version on trial: its share of the orders, the evidence for and against it, its promotion or its rollback."""
