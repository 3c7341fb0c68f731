"""The chain of sources, its budget and the guards. It is pure code and knows no transport."""
