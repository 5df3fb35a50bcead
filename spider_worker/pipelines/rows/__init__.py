"""Rows of a source on their way to a model: what pipelines that read prompts share."""
