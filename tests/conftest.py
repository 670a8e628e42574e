"""The fixtures are in `shared_fixtures.py`: a process that only hands out tests to workers need not import torch."""


def pytest_configure(config):
    if not getattr(config.option, "numprocesses", None):  # of a worker it is None too
        config.pluginmanager.import_plugin("shared_fixtures")
