"""The suite is a specification: a file a module, deterministic, without sleeps, without network.

`--hypothesis-profile deep` looks further and elsewhere each time.
"""

from hypothesis import settings

settings.register_profile("sumus", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("deep", derandomize=False, database=None, deadline=None, max_examples=3000)
settings.load_profile("sumus")
