"""What operators set while servers run, shared by all servers: trading state, flags, breakers, drains, the chain."""
