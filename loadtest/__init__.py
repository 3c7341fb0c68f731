"""Load scenarios and the benchmark; they call the server as any other client does."""
