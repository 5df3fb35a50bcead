"""Thinking Machines' Tinker, or any server that speaks its protocol, over the ``tinker`` SDK.

``sdk``       which versions of the SDK are known to work; the one importer of it
``errors``    what the SDK raises, as Spider's errors
``pulse``     whether the service is still there, asked while somebody waits for it
``wire``      the HTTP client under it, watched for results that never come
``service``   one session: key, address, models, calls, downloads
``sampling``  a TokenEngine over what the service samples from

``engines.tokens.tinker`` and ``trainers.tinker`` stand on it; they are siblings and never meet.
"""
