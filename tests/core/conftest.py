"""Property tests are the same on every machine and do not watch the clock."""

from hypothesis import settings

settings.register_profile("fullrank", deadline=None, derandomize=True, database=None)
settings.load_profile("fullrank")
