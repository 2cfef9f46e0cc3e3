#!/bin/sh
# Installs depth-lab from this folder alone, without a network:   sh install.sh [NEW FOLDER]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
seen=""
for python in python@PYTHON@ python3 python; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$version" = "@PYTHON@" ]; then
        exec "$python" "$here/install.py" "$@"
    fi
    seen="$seen $python is $version."
done
echo "error: these packages need Python @PYTHON@.${seen:- No Python was found.} Install Python @PYTHON@ from python.org" >&2
echo "(on Debian and Ubuntu also python3-venv), or pack a folder with your Python; depth-lab needs 3.11 or later." >&2
exit 1
