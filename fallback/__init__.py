"""The chain of sources, its budget and the guards; pure and transport-free."""
