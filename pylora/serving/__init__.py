"""Serving: many requests at once on one model, each with its own adapters, from one thread.

`Engine` takes `Request`s of token ids and says what comes of them in events; `Registry` holds the
adapters that requests name. Text, HTTP and pages are built on these and know nothing of steps.
"""
