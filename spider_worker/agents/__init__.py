"""Agent processes: a warm pool of them, one episode each, and the proxy that they speak to.

What runs inside such a process is ``spider_agent``; this is the worker's side. An agent has no
key: for an OpenAI-compatible endpoint it speaks to the proxy, which adds the key and counts the
money; for others the key goes to it on its standard input, and nowhere else.
"""
