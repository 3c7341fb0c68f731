"""Coverage-guided fuzzing of what callers' bytes reach first: framing, the ASGI edge, and the reader of orders.

`make fuzz SECONDS=60` runs atheris (libFuzzer for Python) on each target in turn, from the inputs in
`corpus/<target>/`. An input that breaks a target's promise is kept in `crashes/<target>/`, to be committed with the
fix: the tests run every input of both folders again, with and without atheris. `targets.py` says what each promises.
"""
