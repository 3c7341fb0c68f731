"""Shows the product at work: the demo, and canaries that run until they are promoted or rolled back."""
