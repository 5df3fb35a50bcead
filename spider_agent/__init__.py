"""The agent's side of a SWE job: what runs in the agent's own interpreter.

It knows nothing of the rest of Spider and imports nothing of it: a request comes as JSON, events
and the end go out as lines of JSON (``lines.py`` has the words). ``__main__`` runs one episode;
``zygote`` imports everything once and then forks a process for each episode, which shuts itself in
(``confine``) before it runs.
"""
