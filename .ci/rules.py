"""Rules of the house that no linter knows. Prints each offence and exits 1 if there is one.

No file of jaxscale/ is longer than 400 lines; no file is called utils.py; constraints.txt holds `name==version` lines
only; private parts of JAX are used in jaxscale/jax_private.py alone; no file that git knows of names a place on
somebody's machine or the host of a package registry.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
# Written in parts, so that this file does not break its own rule.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:" + "home|Users" + r")/(?!someone\b)\w+",
            r"(?<![\w./])/(?:" + "root|work" + r")/\w+",
            r"(?:files\.)?" + "python" + r"hosted\.org",
            r"\bpy" + r"pi\.(?:org|python\.org)",
            r"--(?:extra-)?index" + "-url",
        )
    )
)
PRIVATE, PRIVATE_HOME = re.compile(r"\bjax(?:lib)?\._(?!_)"), "jaxscale/jax_private.py"
CONSTRAINT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+")


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    offences: list[str] = []
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = ROOT / name
        if path.is_file():
            offences += check(name, path)
    print("\n".join(offences) or "no offence")
    return 1 if offences else 0


def check(name: str, path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        return []  # data
    found = []
    if name.startswith("jaxscale/") and name.endswith(".py") and len(lines) > MAX_LINES:
        found.append(f"{name}: {len(lines)} lines; split it, a file of jaxscale/ has at most {MAX_LINES}")
    if path.name == "utils.py":
        found.append(f"{name}: name the file after what is in it")
    for number, line in enumerate(lines, 1):
        if match := FORBIDDEN.search(line):
            found.append(f"{name}:{number}: {match.group()!r} holds only on one machine or names a package host")
        if name.startswith("jaxscale/") and name != PRIVATE_HOME and PRIVATE.search(line):
            found.append(f"{name}:{number}: a private part of JAX; put the call into {PRIVATE_HOME}")
        if name == "constraints.txt" and not CONSTRAINT.fullmatch(line):
            found.append(f"{name}:{number}: {line!r} is not name==version")
    return found


if __name__ == "__main__":
    sys.exit(main())
