"""Intel Gaudi's `habana_frameworks`, emulated on a CPU."""

import os

from habana_frameworks.emulator.real_plugin import refuse_beside_a_real_plugin

if os.environ.get("HABANA_EMULATOR_DRY", "0") == "0":  # a dry card stands in for none: it computes nothing
    refuse_beside_a_real_plugin()


def load_with_torch() -> None:
    """Called by `import torch` (entry point group `torch.backends`), as the real plugin is."""
    import habana_frameworks.torch  # noqa: F401
