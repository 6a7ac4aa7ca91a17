"""Eight emulated CPU devices for every test, and a compilation cache on disk that survives between runs."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

from jaxscale.mesh import emulation_flags

# As `prepare_backend` does where it emulates devices (jaxscale/mesh.py says why); here JAX has its devices before that.
os.environ["XLA_FLAGS"] = emulation_flags(os.environ.get("XLA_FLAGS", ""))
jax.config.update("jax_num_cpu_devices", 8)
CACHE = Path(os.environ.get("JAXSCALE_TEST_CACHE", Path.home() / ".cache" / "jaxscale" / "test-compile"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A busy machine is no fault of what is tested.
hypothesis.settings.register_profile("jaxscale", deadline=None)
hypothesis.settings.load_profile("jaxscale")
