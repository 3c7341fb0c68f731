"""Models that were trained elsewhere: read, checked, calibrated and put into an archive, or combined with others."""
