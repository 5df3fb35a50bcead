"""On-policy distillation: the student samples, its teachers score, it learns from the reverse KL.

``pipeline``     plan, run, publish, finalise: the contract of pipelines
``parts``        what the pipeline is put together from, each behind a function that builds it
``sampling``     how the student samples
``prompts``      rows in order as prompts, with a cursor; which rows are held out
``supervision``  what the teachers make of a rollout: advantages and dense targets
``batch``        one batch: sampled, scored, made into training sequences
``training``     the loop: batch, substeps, evaluation, checkpoint, until an end is reached
``evaluation``   held-out KL, and the user's score
``checkpoints``  states that training goes on from, and the adapters that are kept
``record``       a step's metrics, as one record
``finish``       the end: curves, the adapter, its publication, the summary
"""
