"""Feature vectors in Redis: their packed form, a cluster's nodes, and the decision server's copy of them."""
