"""Mutation testing: change the code at one place, and check that a test fails.

    make mutations [SAMPLE=240] [SEED=1] [WORKERS=2]

The command draws a sample of mutants with a fixed seed (`sampling`), runs the tests that cover each mutated line
(`coverage_map`, `trial`), and appends each outcome to `results.jsonl` (`outcomes`). A mutant is killed when a test
fails or runs into its time limit. The score is killed / (sampled - equivalent); the command exits with 1 when it is
below 95 %.

Mutants that no test can tell from the original are listed in `equivalent.toml` with the reason.

An interrupted run continues where it stopped. A stored outcome is used again as long as the mutant makes the same
change in the same function, and the source of the test functions that decided it is the same: that of the test that
failed, or for a survivor those of all tests that cover the line.

The coverage map is recorded once by one run of the unit, contract and integration tests, and stored in
`build/mutations`. Record test files again after a change to them:

    PYTHONPATH=tests python -m mutations --record tests/unit/test_codec.py

Limits: code that only a subprocess of a test executes counts as not covered, and a mutant in a line that no test
covers counts as survived. At most 30 seconds of tests are run on a mutant; when none of them fails it counts as
survived.
"""
