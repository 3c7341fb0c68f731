"""Feature vectors in Redis: their packed form, the nodes of a cluster, and the decision server's copy of them."""
