"""Whether what models see, and say, still is what they learnt: population stability, missing values, reports."""
