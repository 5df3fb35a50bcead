"""A causal language model under torch and transformers, as teachers and the local student use it.

``parameters`` what a job may say about one, checked without torch
``causal``     loading it; hidden states and logits apart
``scoring``    log-probabilities and distributions at given positions
``drawing``    from logits to a token, by numbers that a seed decides
``steps``      one more token for a batch, with keys and values kept
``decoding``   sampling a batch
``serving``    both for whoever waits, batched, on one thread

``engines.tokens`` and ``trainers.local`` stand on it; they are siblings and never meet.
"""
