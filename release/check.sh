#!/usr/bin/env bash
# Build the distribution of what is committed and look at it as a user would get it.
#
#     release/check.sh [PYTHON...]          interpreters to install it for; default: python3
#
# Leaves wheel and sdist in dist/. Everything else happens in a temporary folder, each installation in an environment of
# its own: import, version, and the demo in short, which trains, predicts and evaluates. pip reads its settings as always,
# so that PIP_EXTRA_INDEX_URL may name a CPU build of torch and PIP_CONSTRAINT a file of versions.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -gt 0 ] || set -- python3
work="$(mktemp -d "${TMPDIR:-/tmp}/scperturbdiff-release.XXXXXX")"
trap 'rm -rf "$work"' EXIT
cd "$root"

say() { printf '\n== %s\n' "$*"; }

say "build"
[ -z "$(git status --porcelain)" ] || echo "what is not committed is left out"
mkdir "$work/source"
git archive HEAD | tar -xf - -C "$work/source"
"$1" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q build twine
rm -rf dist
"$work/tools/bin/python" -m build -o dist "$work/source"
"$work/tools/bin/python" -m twine check --strict dist/*

say "contents"
"$work/tools/bin/python" - dist/*.whl dist/*.tar.gz <<'CHECK'
import sys, tarfile, zipfile

wheel, sdist = sys.argv[1:]
with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
with tarfile.open(sdist) as file:
    members = [member for member in file.getmembers() if member.isfile()]
folder = next(name.split("/")[0] for name in names if ".dist-info/" in name)
needed = {"scperturbdiff/py.typed", f"{folder}/licenses/LICENSE", f"{folder}/entry_points.txt"}
assert needed <= set(names), f"the wheel lacks {sorted(needed - set(names))}"
other = [n for n in names if not n.startswith((f"{folder}/", "scperturbdiff/")) or "/tests/" in n]
other += [n for n in names if n.startswith("scperturbdiff/") and not n.endswith((".py", "/py.typed"))]
assert not other, f"the wheel has more than the package: {other}"
inside = {member.name.split("/", 1)[1] for member in members}
needed = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "src/scperturbdiff/py.typed"}
assert needed <= inside, f"the sdist lacks {sorted(needed - inside)}"
large = [(member.name, member.size) for member in members if member.size > 500_000]
assert not large, f"data in the sdist? {large}"
print(f"{len(names)} files in the wheel, {len(members)} in the sdist")
CHECK

wheel="$(ls "$PWD"/dist/*.whl)"
version="$(basename "$wheel" | cut -d- -f2)"
for python in "$@"; do
    say "$("$python" --version): install, import, version, train and predict"
    environment="$work/$(basename "$python")"
    "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install -q "$wheel"
    "$environment/bin/python" -m pip check
    (
        cd "$work" # away from the source
        "$environment/bin/python" -c "import scperturbdiff; print(scperturbdiff.__version__, scperturbdiff.PerturbDiff)"
        test "$("$environment/bin/scperturbdiff" --version)" = "scperturbdiff $version"
        "$environment/bin/scperturbdiff" demo --quick --out "$environment/demo"
    )
    rm -rf "$environment"
done
say "all passed: scperturbdiff $version"
