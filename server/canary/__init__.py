"""A model version on trial: its share of the orders, the evidence for and against it, and its way up or out."""
