"""Intel Gaudi's `habana_frameworks`, emulated on a CPU."""

from habana_frameworks.emulator.real_plugin import refuse_beside_a_real_plugin

refuse_beside_a_real_plugin()


def load_with_torch() -> None:
    """Called by `import torch` (entry point group `torch.backends`), as the real plugin is."""
    import habana_frameworks.torch  # noqa: F401
