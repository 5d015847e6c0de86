"""The conformance kit: laws that every implementation of LoRA must keep, run against yours.

    pylora conformance mypkg.mylora:Implementation

`protocol.py` says what an implementation is. Needs the `conformance` extra (hypothesis).
"""

from __future__ import annotations
