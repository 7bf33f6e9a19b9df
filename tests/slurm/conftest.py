from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, ClusterUnavailableError, running_cluster

# What a job would inherit from whoever runs the tests: a launcher's variables and own settings.
INHERITED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("RECIPE", "DS_CONFIG", "SHARDS", "OUTPUT_DIR", "EXTRA_ARGS", "PYTHON", "MAX_RESTARTS"),
    *("CONTAINER", "PREFLIGHT", "PREPARE_ARGS", "EVALUATE_ARGS", "TASKS", "MODEL", "AGAINST"),
    *("DATA_DIR", "PREPARE_FLAGS", "DISTILL_FLAGS", "EVALUATE_FLAGS"),
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests here; each of them ends its own jobs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in INHERITED:
            patch.delenv(name, raising=False)
        try:
            with running_cluster() as running:
                yield running
        except ClusterUnavailableError as error:
            pytest.skip(str(error))
