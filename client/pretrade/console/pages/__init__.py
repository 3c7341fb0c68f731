"""The pages: what each asks the server for, and what it shows of the answers."""
