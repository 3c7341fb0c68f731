"""What is measured, traced and logged of decisions, for people and their tools."""
