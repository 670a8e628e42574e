"""One Ray for all tests that score on it."""

import pytest
import ray

from mmrm_fast.score.cluster import ray_cluster


@pytest.fixture(scope="session")
def cluster():
    """The address of a cluster that runs in this process join; it lasts as long as the process."""
    with ray_cluster():
        yield ray.get_runtime_context().gcs_address
