"""The console: pages in a browser for on-call, compliance and the curious; a client of a server's admin port."""
