"""Engines and converters under test: asked over HTTP or run as commands, judged by the suite."""
