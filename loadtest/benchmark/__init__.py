"""`pretrade bench`: decisions a second and latency of several servers in turn, compared with bare echoes."""
