"""`pretrade bench`: decisions a second and latency of servers in turn, next to bare echoes."""
