"""What a teacher's scores mean for a student's tokens: pure functions, no I/O, no model.

``vocabulary``  the bytes behind each token id of a tokenizer, and which ids are structure
``alignment``   spans: where two token sequences of the same bytes share their cuts
``translation`` a student's completion as the teacher's token ids, with the spans between them
``advantages``  from log-probabilities and spans to an advantage for each student token
``marginal``    a teacher's distribution over its tokens as one over the student's
``losses``      the losses of a training step, in torch (the one module here that imports it)

Throughout, p is the student and q the teacher; δ of a span is Σ log p − Σ log q over it, so a
positive δ is a span that the student likes better than its teacher does. Entry ``i`` of an
array belongs to token ``i`` (see ``spider_worker.tokens``).
"""
