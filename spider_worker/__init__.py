"""The worker: supervisors, runners and the pipelines that they run."""
