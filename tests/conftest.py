"""Settings of every test."""

import os

from hypothesis import settings

# In CI the same examples every time: a chance find belongs to a developer's run, not to somebody else's change.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
