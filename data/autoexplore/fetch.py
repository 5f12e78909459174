"""Fetches real source trees to ask questions about: the source packages of five Python projects, with pip.

    python data/autoexplore/fetch.py                       # five directories in data/autoexplore/real/
    python rl.py --env autoexplore --repos data/autoexplore/real
"""

import argparse
import pathlib
import subprocess
import sys
import tarfile
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent.parent) not in sys.path:
    sys.path.append(str(HERE.parent.parent))

from envs import UserError, run_main  # noqa: E402

PACKAGES = {"click": "8.5.1", "flask": "3.1.3", "httpx": "0.28.1", "jinja2": "3.1.6", "rich": "15.0.0"}  # pinned


def fetch(name, version, out):
    """The source tree of a package as the directory `out/name`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:
        # The package alone must be source: what pip builds its metadata with may be a wheel.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        done = subprocess.run([*command, "--dest", folder, f"{name}=={version}"], capture_output=True, text=True)
        found = list(pathlib.Path(folder).glob("*.tar.gz"))
        if done.returncode or len(found) != 1:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise UserError(f"pip found no source package of {name} {version}: {' '.join(said[-1:])}")
        try:
            with tarfile.open(found[0]) as archive:
                # PKG-INFO is no file of the project; it repeats README and pyproject.toml.
                members = [member for member in archive if pathlib.PurePath(member.name).name != "PKG-INFO"]
                archive.extractall(folder, members, filter="data")
            [tree] = [path for path in pathlib.Path(folder).iterdir() if path.is_dir()]
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"cannot unpack {found[0].name}: {error}") from None
        tree.rename(out / name)


def main():
    parser = argparse.ArgumentParser(description="Fetch five real source trees.", allow_abbrev=False)
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, default=HERE / "real", help="(default: real/ here)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if not (out / name).exists():
            fetch(name, version, out)
        print(f"{out / name}: {sum(path.is_file() for path in (out / name).rglob('*'))} files")


if __name__ == "__main__":
    run_main(main)
