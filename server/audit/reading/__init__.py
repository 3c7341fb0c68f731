"""Reading and verifying what was audited, from the database and the journals."""
