"""What shows the product at work: the demo, and canaries each to its end."""
