#!/usr/bin/env python3
"""Generate the synchronous client from the asynchronous one.

python client/make_sync.py            write src/underpaint/client.py
python client/make_sync.py --check    exit 1 if src/underpaint/client.py is not up to date with src/underpaint/aio.py
"""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "src" / "underpaint"
HEADER = '''"""The synchronous client, generated from ``aio.py`` by ``client/make_sync.py``: edit ``aio.py``."""
'''
RULES = (
    (r"\A\"\"\".*?\"\"\"\n", HEADER),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAsync(Client|Connection|Learning|Opened)\b", r"\1"),
    (r"\b(apart|deliver|receive)_async\b", r"\1"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\bin_order_async\b", "in_order"),
    (r"\bfor (\w+) in ([^\n]+):\n +yield \1\n", r"yield from \2\n"),
)


def synchronous(source: str) -> str:
    """The synchronous source code for an asynchronous one, formatted."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source, flags=re.DOTALL)
    commands = ["ruff", "check", "--quiet", "--select=I", "--fix", "-"], ["ruff", "format", "--quiet", "-"]
    for command in commands:
        run = [sys.executable, "-m", *command, "--stdin-filename", str(PACKAGE / "client.py")]
        source = subprocess.run(run, input=source, check=True, capture_output=True, text=True).stdout
    return source


def main() -> int:
    """Write the file, or with ``--check`` compare it; returns the exit status."""
    generated = synchronous((PACKAGE / "aio.py").read_text())
    target = PACKAGE / "client.py"
    if "--check" not in sys.argv[1:]:
        target.write_text(generated)
    elif target.read_text() != generated:
        print("client.py is not up to date with aio.py; run: python client/make_sync.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
