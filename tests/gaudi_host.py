"""A Gaudi host without a Gaudi: this project's targets must work where torch and the plugin are the container's own.

    make test-gaudi-host                 setup, test-hpu, lint and some of the tests, in a copy of the checkout
    python tests/gaudi_host.py --all     quickstart and all the tests as well

The host's Python has a tree of its own, made of links: the standard library, torch and what else `requirements.txt`
names, but no pytest, ruff or hypothesis. Its plugin is a distribution `habana-torch-plugin` that looks like the real
one: no `+cpu` in its version, no `habana_frameworks.emulator` (the same code stands there under another name).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGIN_VERSION = "1.24.0.460"
# What this project's own files install beside a container's packages
OURS = re.compile(
    r"(pytest|pytest_cov|pytest_timeout|hypothesis|ruff|mypy|coverage|habana_torch_plugin)-|habana_framew|__pycache__"
)


def make_python(folder: Path) -> Path:
    """The host's Python: a copy of this one's executable over a tree of links. Returns its path."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library, packages = folder / "lib" / version, folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    for path in Path(sysconfig.get_path("stdlib")).iterdir():
        if path.name != "site-packages":
            (library / path.name).symlink_to(path)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not OURS.match(path.name):
            (packages / path.name).symlink_to(path)
    base = Path(sys.base_prefix)
    for path in (base / "lib").glob("libpython*"):
        (folder / "lib" / path.name).symlink_to(path)
    (folder / "include").symlink_to(base / "include")
    (folder / "bin").mkdir()
    python = folder / "bin" / version
    shutil.copy2(os.path.realpath(sys.executable), python)
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(python)
    install_plugin(packages)
    return python


def install_plugin(packages: Path) -> None:
    plugin = packages / "habana_frameworks"
    shutil.copytree(ROOT / "emulator" / "habana_frameworks", plugin, ignore=shutil.ignore_patterns("__pycache__"))
    (plugin / "emulator").rename(plugin / "inside")
    for path in plugin.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("habana_frameworks.emulator", "habana_frameworks.inside")
        path.write_text(text.replace("from habana_frameworks import emulator", "from habana_frameworks import inside"))
    (plugin / "inside" / "real_plugin.py").write_text("def refuse_beside_a_real_plugin():\n    pass\n")
    about = packages / f"habana_torch_plugin-{PLUGIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: habana-torch-plugin\nVersion: {PLUGIN_VERSION}\n")
    (about / "INSTALLER").write_text("container\n")
    (about / "RECORD").write_text("")
    (about / "entry_points.txt").write_text("[torch.backends]\nplugin = habana_frameworks:load_with_torch\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="run quickstart and all the tests too")
    everything = parser.parse_args().all
    with tempfile.TemporaryDirectory() as folder:
        python = make_python(Path(folder, "host"))
        checkout = Path(folder, "checkout")
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, files.split("\0")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
        keep = {"PATH", "HOME", "LANG", "TMPDIR", "CI"} | {name for name in os.environ if name.startswith("PIP_")}
        environment = {name: value for name, value in os.environ.items() if name in keep}
        environment["PATH"] = environment["PATH"].replace(f"{Path(sys.executable).parent}:", "")
        environment["HABANA_VISIBLE_MODULES"] = "0,1,2,3,4,5,6,7"
        tests = (
            "tests"
            if everything
            else "tests/conformance/test_kernels.py tests/test_sft.py::test_every_way_to_train_lowers_the_loss"
        )
        for target in ["setup", "test-hpu", "lint", *(["quickstart"] if everything else []), "test"]:
            print(f"make {target} on a simulated Gaudi host", flush=True)
            command = ["make", target, f"PYTHON={python}", f"TESTS={tests if target == 'test' else ''}"]
            if subprocess.run(command, cwd=checkout, env=environment, check=False).returncode:
                sys.exit(f"make {target} failed on a simulated Gaudi host")
    print("A Gaudi host's targets work.")


if __name__ == "__main__":
    main()
