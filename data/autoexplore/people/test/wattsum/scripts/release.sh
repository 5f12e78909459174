#!/bin/sh
# Only from the main branch, and with Ottilie's signature on the tag.
set -eu
version=$(python -c "import wattsum; print(wattsum.__version__)")
git verify-tag "v$version"
python -m build
twine upload "dist/wattsum-$version"*
