"""The runner: a fresh process that runs a job's units through its pipeline."""
