"""Settings of the whole suite."""

from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code. The
# suite draws the same examples every time; `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")
