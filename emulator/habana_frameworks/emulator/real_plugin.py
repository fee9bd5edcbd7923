"""Never stand in for a Gaudi that is there. Imports nothing but the standard library: setup.py runs this file too."""

import glob
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

HABANA_PCI_VENDOR = "0x1da3"


def sign_of_a_real_gaudi() -> str | None:
    """What shows that this Python or this host has the real thing, or None."""
    for distribution in distributions(name="habana-torch-plugin"):
        if not distribution.version.endswith("+cpu"):
            return f"habana-torch-plugin {distribution.version} is installed"
    for vendor in glob.glob("/sys/class/accel/accel*/device/vendor"):
        if Path(vendor).read_text().strip() == HABANA_PCI_VENDOR:
            return f"this host has a Gaudi ({Path(vendor).parents[1].name})"
    hl_smi = shutil.which("hl-smi")
    return f"this host has Gaudi's tools ({hl_smi})" if hl_smi else None


def refuse_beside_a_real_plugin() -> None:
    sign = sign_of_a_real_gaudi()
    if sign:
        raise ImportError(
            f"the emulator of habana-torch-plugin is for machines without a Gaudi, but {sign}: "
            "uninstall the emulator (version 1.24.0+cpu) and install the plugin that Gaudi's software stack brings"
        )


if __name__ == "__main__":
    try:
        refuse_beside_a_real_plugin()
    except ImportError as error:
        sys.exit(f"error: {error}")
