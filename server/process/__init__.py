"""The processes of one server: starting, replacing and stopping them, and their health."""
