"""Settings that must hold before torch, transformers or datasets are imported, here and in processes tests start."""

import os

from hypothesis import settings

os.environ |= {
    "OMP_NUM_THREADS": "1",  # several processes share few cores; one thread each also makes sums repeat bit for bit
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",  # forking after its thread pool has started is a warning
    "HF_HUB_OFFLINE": "1",  # a test that asks the network fails here as it does in CI
    "HF_DATASETS_OFFLINE": "1",
}

settings.register_profile(
    "shared", deadline=None
)  # cores are shared with process groups: time says nothing
settings.load_profile("shared")
