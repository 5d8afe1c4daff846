#!/usr/bin/env bash
# Says what an installation consists of, and whether any of it is known to be vulnerable:
#
#   deploy/check_dependencies.sh [ENVIRONMENT] [FOLDER]     default: .venv and build
#
# FOLDER/sbom.json is a CycloneDX bill of materials of every package in ENVIRONMENT with its version,
# licence and what asks for it. FOLDER/audit.json holds what PyPI's advisories say of the pinned versions in
# constraints.txt. The tools get an environment of their own, which is thrown away.
#
# The exit code is 1 where something is vulnerable, and also where it could not be asked: an index that
# has no advisories answers as if nothing were known, so every package must really have been looked up.

set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
environment=${1:-$root/.venv}
folder=${2:-$root/build}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

python3 -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check \
  cyclonedx-bom==7.5.0 pip-audit==2.10.1

mkdir -p "$folder"
"$tools/bin/cyclonedx-py" environment --pyproject "$root/pyproject.toml" --output-reproducible \
  --output-format JSON --output-file "$folder/sbom.json" "$environment/bin/python"
"$tools/bin/python" - "$folder/sbom.json" <<'PYTHON'
import json, sys
bill = json.load(open(sys.argv[1]))
print(f"{sys.argv[1]}: {len(bill['components'])} packages, CycloneDX {bill['specVersion']}")
PYTHON

"$tools/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off \
  --requirement "$root/constraints.txt" --format json --output "$folder/audit.json"
